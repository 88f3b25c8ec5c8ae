"""The tracking URI of a store: written down by its first run, and found by later ones and by commands with a name."""

import shutil
from pathlib import Path

import pytest

from masters.common.errors import InputError
from masters.config.allowlist import Setting
from masters.flows.garbage_collection import collect_garbage
from masters.store.storage import Storage
from masters.tracking import locations
from masters.tracking.lineage_report import find_registry, trace_lineage
from masters.tracking.locations import check_tracking_uri, record_uri, recorded_uris, remembered_stores, tracking_uri
from masters.tracking.run_writer import RunWriter
from tests.tracked_run import NAME, make_config, write_run

SERVER = "http://127.0.0.1:9"


pytestmark = pytest.mark.usefixtures("home")


def uri(storage: Storage, **runtime) -> str:
    """Return where a run without MLFLOW_TRACKING_URI would be tracked."""
    return tracking_uri(make_config(storage.uri(""), **runtime), storage)


def test_the_address_of_the_first_run_stays(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    assert uri(storage) == f"sqlite:///{storage.path('mlflow.db')}"
    record_uri(storage, SERVER)
    record_uri(storage, "http://other:5000")
    record_uri(storage, SERVER)
    assert uri(storage) == SERVER
    assert list(recorded_uris(storage)) == [SERVER, "http://other:5000"]
    assert uri(storage, mlflow_uri="http://configured:5000") == "http://configured:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://chosen:5000")
    assert uri(storage) == "http://chosen:5000"


def test_a_default_database_moves_with_its_store(storage: Storage, tmp_path: Path) -> None:
    write_run(storage)
    moved = Storage(str(shutil.move(storage.uri(""), tmp_path / "moved")))
    assert uri(moved) == f"sqlite:///{tmp_path / 'moved/mlflow.db'}" == next(iter(recorded_uris(moved)))


def test_a_database_elsewhere_is_used_while_it_exists(storage: Storage, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.db"
    elsewhere.touch()
    record_uri(storage, f"sqlite:///{elsewhere}")
    assert uri(storage) == f"sqlite:///{elsewhere}"
    elsewhere.unlink()
    assert uri(storage) == f"sqlite:///{storage.path('mlflow.db')}"


@pytest.mark.parametrize(
    ("given", "absolute"),
    [
        ("sqlite:///mlruns.db", "sqlite:///{here}/mlruns.db"),
        ("sqlite:///./runs/m.db", "sqlite:///{here}/runs/m.db"),
        ("sqlite+pysqlite:///m.db?timeout=5", "sqlite+pysqlite:///{here}/m.db?timeout=5"),
        ("sqlite:////data/a@b/m.db", "sqlite:////data/a@b/m.db"),
        ("postgresql://host/m.db", "postgresql://host/m.db"),
    ],
)
def test_a_relative_sqlite_file_is_the_same_in_every_working_folder(
    given: str, absolute: str, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    absolute = absolute.format(here=tmp_path)
    assert uri(storage, mlflow_uri=given) == absolute == locations.candidate_uris(None, given)[0]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert uri(storage) == absolute == locations.candidate_uris(None, None)[0]


def test_a_run_in_a_relative_file_is_found_from_another_working_folder(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlruns.db")
        write_run(storage)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert uri(storage) == find_registry(NAME).uri == f"sqlite:///{tmp_path}/mlruns.db"


@pytest.mark.parametrize("address", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:mlruns.db"])
def test_a_sqlite_address_without_a_file_is_refused(address: str, storage: Storage) -> None:
    with pytest.raises(InputError, match="expected a tracking URI like sqlite:////folder/mlflow.db, found 'sqlite:"):
        uri(storage, mlflow_uri=address)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/proc/none/mlflow.db", "/proc, .* cannot be written"),
        ("{here}/file/mlflow.db", "{here}/file, .* cannot be written .it is not a folder"),
        ("{here}/file/deep/mlflow.db", "{here}/file, .* cannot be written .it is not a folder"),
        ("{here}", "the tracking database {here} cannot be written .Is a directory"),
        ("{here}/a%20b.db", "its address cannot contain"),
    ],
)
def test_a_database_that_cannot_be_created_is_refused_before_a_run(
    path: str, reason: str, storage: Storage, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    config = make_config(storage.uri(""), mlflow_uri=f"sqlite:///{path.format(here=tmp_path)}")
    with pytest.raises(InputError, match=reason.format(here=tmp_path)) as caught:
        check_tracking_uri(config, storage)
    assert "set runtime.mlflow_uri" in str(caught.value)


def test_a_database_that_can_be_created_is_accepted_without_a_trace(storage: Storage, tmp_path: Path) -> None:
    config = make_config(storage.uri(""), mlflow_uri=f"sqlite:///{tmp_path}/new/deep/mlflow.db")
    assert check_tracking_uri(config, storage) == config.runtime.mlflow_uri
    assert not (tmp_path / "new").exists()


def test_an_address_that_an_older_version_wrote_is_the_first_one(storage: Storage) -> None:
    record_uri(storage, "http://later:5000")
    storage.create("tracking/older.json", b'{"uri": "http://older:5000"}')
    assert uri(storage) == "http://older:5000"
    assert list(recorded_uris(storage)) == ["http://older:5000", "http://later:5000"]


def test_a_store_does_not_lead_to_an_address_that_is_not_allowed(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(Setting.MLFLOW, "http://allowed:5000")
    assert uri(storage).startswith("sqlite:")
    record_uri(storage, SERVER)
    with pytest.raises(InputError, match=f"the MLflow of the store {storage.uri('')}"):
        uri(storage)


@pytest.mark.parametrize("address", ["postgresql://me:hunter2@host/mlflow", "http://me:hunter2@host/mlflow"])
def test_the_store_has_no_password(address: str, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    record_uri(storage, address)
    assert list(recorded_uris(storage)) == [address.replace("me:hunter2@", "")]
    assert "hunter2" not in str([storage.read(name) for name in storage.names("tracking")])
    assert locations.without_secrets(address) in recorded_uris(storage)


def test_a_name_leads_to_the_mlflow_of_its_store(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    """It was named by the environment of the run only."""
    database = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", database)
        writer, _ = write_run(storage)
    assert find_registry(NAME).uri == trace_lineage(NAME)["mlflow"] == database
    assert trace_lineage(writer.run_id)["of"] == f"run {writer.run_id}"
    assert collect_garbage(make_config(storage.uri("")))["items"] == []
    assert writer.uri not in "".join(file.read_text() for file in home.rglob("*") if file.is_file())


def test_the_last_store_of_a_name_is_kept(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "later").mkdir()
    later = Storage(str(tmp_path / "later"))
    for name, store in ((NAME, storage), ("another", storage), (NAME, later)):
        locations.remember_store(name, store)
    assert remembered_stores(NAME) == [later.uri("")]
    assert remembered_stores() == [later.uri(""), storage.uri("")]


def test_a_name_without_a_store_is_unknown(storage: Storage) -> None:
    assert remembered_stores(NAME) == remembered_stores("../../etc/hostname") == []
    with pytest.raises(InputError, match=f"no run of {NAME} was made on this machine"):
        find_registry(NAME)
    locations.remember_store(NAME, storage)
    storage.remove_empty_folders("")
    with pytest.raises(InputError, match=f"no run of {NAME} was made on this machine"):
        find_registry(NAME)


def test_the_mlflow_of_a_store_that_does_not_answer_is_an_error(storage: Storage) -> None:
    """Another one may have a model of this name, too."""
    record_uri(storage, SERVER)
    locations.remember_store(NAME, storage)
    with pytest.raises(InputError, match="does not answer"):
        find_registry(NAME)


@pytest.mark.parametrize("scheme", ["sqlite", "sqlite+pysqlite"])
@pytest.mark.parametrize("is_empty", [False, True])
def test_the_database_of_another_machine_is_missing_and_not_created(
    scheme: str, is_empty: bool, storage: Storage, tmp_path: Path
) -> None:
    database = tmp_path / "other/mlflow.db"
    if is_empty:
        database.parent.mkdir()
        database.touch()
    record_uri(storage, f"{scheme}:///{database}")
    locations.remember_store(NAME, storage)
    for reference in (NAME, "0" * 32):
        with pytest.raises(InputError, match=f"no MLflow database at {database} on this machine: name .*--mlflow-uri"):
            trace_lineage(reference)
    assert not database.exists() or not database.stat().st_size


def test_a_run_without_finished_stages_says_so_whatever_other_stores_there_are(
    storage: Storage, tmp_path: Path
) -> None:
    writer = RunWriter(make_config(storage.uri("")), storage)
    writer.finish("FAILED")
    (tmp_path / "later").mkdir()
    later = Storage(str(tmp_path / "later"))
    record_uri(later, SERVER)
    locations.remember_store("later", later)
    with pytest.raises(InputError, match=f"run {writer.run_id} finished no stage of a distillation"):
        trace_lineage(writer.run_id)
    with pytest.raises(InputError, match=f"run {'0' * 32} was not found .*; MLflow at {SERVER} does not answer"):
        trace_lineage("0" * 32)
