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
from masters.tracking.locations import record_uri, recorded_uris, remembered_stores, tracking_uri
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
