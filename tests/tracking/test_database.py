"""Several first runs at once: one creates the tables of MLflow's database, the others wait. SQLite and Postgres."""

import multiprocessing
import os
import resource
import shutil
import sqlite3
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from masters.cli.options import silence_libraries
from masters.common.errors import InputError, TrackingError, Unreachable
from masters.infra import postgres
from masters.infra.service import start_service, stop_service, wait_until_ready
from masters.store.storage import Storage
from masters.tracking.client import client
from masters.tracking.database import create_tables
from masters.tracking.run_writer import RunWriter
from tests.tracked_run import NAME, make_config, write_run

FORK = multiprocessing.get_context("fork")  # importing MLflow again takes a process seconds


def run_at_once(storage: Storage, count: int, run: Callable[[Storage, bytes], object]) -> list[int | None]:
    """Start first runs in processes of their own, at the same moment. Returns their exit codes; prints their errors."""
    barrier, errors = FORK.Barrier(count), FORK.SimpleQueue()

    def start(number: int) -> None:
        barrier.wait()
        try:
            run(storage, str(number).encode())
        except Exception:
            errors.put(traceback.format_exc()[-4000:])  # less than a pipe holds: nobody reads yet
            raise

    processes = [FORK.Process(target=start, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    while not errors.empty():
        print(errors.get())
    return [process.exitcode for process in processes]


def open_run(storage: Storage, _: bytes) -> None:
    RunWriter(make_config(storage.uri("")), storage).finish("FINISHED")


def statuses(uri: str) -> list[str]:
    """Return the statuses of all distillations."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(NAME)
    assert experiment
    runs = client.search_runs([experiment.experiment_id], "tags.`masters.parent` = 'yes'")
    return [run.info.status for run in runs]


def test_simultaneous_first_runs_share_a_file(storage: Storage) -> None:
    assert run_at_once(storage, 3, open_run) == [0] * 3
    assert statuses(f"sqlite:///{storage.path('mlflow.db')}") == ["FINISHED"] * 3
    assert [name for name in os.listdir(storage.uri("")) if name.startswith(".mlflow")] == []


@pytest.mark.parametrize("is_empty", [False, True])
def test_an_interrupted_migration_leaves_no_half_made_file(is_empty: bool, storage: Storage) -> None:
    """A process that may write few bytes to a file stops as on a full disk; the next run creates the tables."""
    database = Path(storage.path("mlflow.db"))
    if is_empty:
        database.touch()

    def stop_early(storage: Storage, _: bytes) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        with pytest.raises(Exception, match="disk I/O error|is full"):
            client(f"sqlite:///{database}")

    assert run_at_once(storage, 1, stop_early) == [0]
    assert [path.name for path in database.parent.iterdir() if path.suffix == ".db"] == ["mlflow.db"] * is_empty
    assert not is_empty or not database.stat().st_size
    assert run_at_once(storage, 1, open_run) == [0]
    assert statuses(f"sqlite:///{database}") == ["FINISHED"]


class PostgresServer:
    """A Postgres server with an empty database in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._sockets = folder, folder / "sockets"
        self._sockets.mkdir()
        self.uri = f"postgresql+psycopg2://postgres@/mlflow?host={self._sockets}"

    def start(self) -> None:
        service = postgres.make_service(self._folder / "data", self._sockets, dict(os.environ))
        self._started = start_service(service, self._folder, "test")
        wait_until_ready(service, self._started, self._folder, 120)
        postgres.create_databases(self._sockets)

    def stop(self) -> None:
        stop_service(self._started)


@pytest.fixture
def postgres_server() -> Iterator[PostgresServer]:
    folder = Path(tempfile.mkdtemp(prefix="masters-postgres-"))  # a socket's path must be short
    folder.chmod(0o711)  # as root, Postgres runs as another user
    server = PostgresServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


@pytest.mark.slow
def test_simultaneous_first_runs_share_postgres(
    postgres_server: PostgresServer, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each registers a student of its own under the same name."""
    postgres_uri = postgres_server.uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", postgres_uri)
    assert run_at_once(storage, 4, write_run) == [0] * 4
    assert statuses(postgres_uri) == ["FINISHED"] * 4
    versions = MlflowClient(postgres_uri).search_model_versions(f"name = '{NAME}'")
    assert sorted(int(version.version) for version in versions) == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_postgres_that_stops_is_an_error_with_a_remedy_until_it_answers_again(
    postgres_server: PostgresServer,
) -> None:
    used = client(postgres_server.uri)
    postgres_server.stop()
    with pytest.raises(TrackingError, match=r"MLflow at postgresql\S+ does not answer .*: once it answers again, run"):
        used.get_experiment_by_name("none")
    create_tables.cache_clear()  # as in another process
    with pytest.raises(Unreachable, match=r"MLflow at postgresql\S+ does not answer .*: start it, or choose another"):
        client(postgres_server.uri)
    postgres_server.start()
    assert used.get_experiment_by_name("none") is None


def test_a_postgres_that_does_not_answer_is_unreachable_at_once() -> None:
    """MLflow would try for minutes."""
    started = time.monotonic()
    with pytest.raises(Unreachable, match=r"at postgresql\+psycopg2://127.0.0.1:9/mlflow does not answer .*: start it"):
        client("postgresql+psycopg2://me:hunter2@127.0.0.1:9/mlflow")
    assert time.monotonic() - started < 30


def test_a_new_database_is_not_created_without_its_lock(tmp_path: Path) -> None:
    """Another process may be creating it."""
    (tmp_path / ".mlflow.db.lock").mkdir()
    with pytest.raises(InputError, match="cannot be opened"):
        client(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert [path.name for path in tmp_path.iterdir()] == [".mlflow.db.lock"]


def test_an_existing_database_is_read_without_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tables exist, so its folder need not be writable."""
    file = tmp_path / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").create_experiment("before")
    (tmp_path / ".mlflow.db.lock").mkdir()
    assert client(f"sqlite:///{file}").get_experiment_by_name("before")


def test_a_database_that_cannot_be_opened_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    file.write_text("this is no database, though its name says so")
    with pytest.raises(InputError, match=f"MLflow at sqlite:///{file} cannot be opened: ") as caught:
        client(f"sqlite:///{file}")
    assert "\n" not in str(caught.value)


def test_a_database_of_another_version_is_refused_in_one_line(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    MlflowClient(uri)
    shutil.copy(tmp_path / "mlflow.db", tmp_path / "old.db")
    with sqlite3.connect(tmp_path / "old.db") as connection:
        connection.execute("update alembic_version set version_num = '1'")
    with pytest.raises(InputError, match="out-of-date database schema"):
        client(f"sqlite:///{tmp_path / 'old.db'}")


def test_an_error_of_the_database_is_raised_and_not_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    silence_libraries()
    connected = client(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run_id = connected.create_run("0").info.run_id
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("drop table metrics")
    with pytest.raises(TrackingError, match="no such table"):
        connected.log_metric(run_id, "loss", 1.0)
    assert "Traceback" not in capsys.readouterr().err
