"""Experiments and registered models that someone deleted in MLflow's pages. MLflow on SQLite."""

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Experiment

from masters.common.errors import InputError, TrackingError
from masters.store.artifacts import Identity
from masters.store.storage import Storage
from masters.tracking.experiments import check_tracking
from masters.tracking.run_writer import RunWriter
from tests.tracked_run import NAME, make_config, write_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of one run. Tests work on copies, as a new database takes seconds."""
    store = tmp_path_factory.mktemp("finished") / "store"
    store.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("HOME", str(store.parent))
        write_run(Storage(str(store)))
    return store


@pytest.fixture
def storage(finished: Path, home: Path, tmp_path: Path) -> Storage:
    return Storage(str(shutil.copytree(finished, tmp_path / "store")))


@pytest.fixture
def client(storage: Storage) -> MlflowClient:
    return MlflowClient(f"sqlite:///{storage.path('mlflow.db')}")


def experiment(client: MlflowClient) -> Experiment:
    found = client.get_experiment_by_name(NAME)
    assert found
    return found


def open_run(storage: Storage) -> RunWriter:
    return RunWriter(make_config(storage.uri("")), storage)


def notes(storage: Storage) -> list[str]:
    return check_tracking(make_config(storage.uri("")), storage)[1]


def test_a_deleted_experiment_is_restored_with_a_note(storage: Storage, client: MlflowClient) -> None:
    assert notes(storage) == []
    found = experiment(client)
    before = {run.info.run_id for run in client.search_runs([found.experiment_id])}
    client.delete_experiment(found.experiment_id)
    [note] = notes(storage)
    assert f"experiment {NAME} is deleted in MLflow at {client.tracking_uri}" in note and "choose another name" in note
    assert notes(storage) == [note]  # looking changes nothing
    writer, version = write_run(storage, b"more")
    assert writer.notes == [note] and version == 2
    assert experiment(client).lifecycle_stage == "active"
    assert {run.info.run_id for run in client.search_runs([found.experiment_id])} > before | {writer.run_id}
    assert notes(storage) == []


def test_an_experiment_that_cannot_be_restored_is_refused(
    storage: Storage, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.delete_experiment(experiment(client).experiment_id)

    def refuse(*_: object) -> None:
        raise PermissionError("editors only")

    monkeypatch.setattr(MlflowClient, "restore_experiment", refuse)
    with pytest.raises(InputError, match=f"experiment {NAME} is deleted.*editors only; restore it there, or choose"):
        open_run(storage)


def test_an_experiment_that_another_run_restores_is_used(
    storage: Storage, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.delete_experiment(experiment(client).experiment_id)
    restore = MlflowClient.restore_experiment

    def restore_twice(self: MlflowClient, experiment_id: str) -> None:
        restore(self, experiment_id)
        restore(self, experiment_id)

    monkeypatch.setattr(MlflowClient, "restore_experiment", restore_twice)
    open_run(storage)
    assert experiment(client).lifecycle_stage == "active"


def test_a_deleted_model_is_registered_again_with_a_note(storage: Storage, client: MlflowClient) -> None:
    client.delete_registered_model(NAME)
    [note] = notes(storage)
    assert f"the registered model {NAME} is deleted" in note and "no champion" in note
    again, version = write_run(storage)
    assert again.notes == [note] and version == 1 == again.registry.candidate(NAME)
    assert notes(storage) == []


@pytest.mark.parametrize("is_experiment_deleted", [False, True])
def test_a_deleted_model_is_noted_although_its_runs_are_deleted_too(
    is_experiment_deleted: bool, storage: Storage, client: MlflowClient
) -> None:
    client.delete_registered_model(NAME)
    found = experiment(client)
    if is_experiment_deleted:
        client.delete_experiment(found.experiment_id)
    else:
        for run in client.search_runs([found.experiment_id]):
            client.delete_run(run.info.run_id)
    *others, last = notes(storage)
    assert f"the registered model {NAME} is deleted" in last
    assert [f"experiment {NAME} is deleted" in note for note in others] == [True] * is_experiment_deleted


def test_a_deleted_version_is_registered_again(storage: Storage, client: MlflowClient) -> None:
    client.delete_model_version(NAME, "1")
    again, version = write_run(storage)
    assert version == again.registry.candidate(NAME) and notes(storage) == []


def test_a_name_that_never_registered_a_model_has_no_deleted_one(storage: Storage) -> None:
    config = make_config(storage.uri("")).model_copy(update=dict(name="another"))
    RunWriter(config, storage).finish("FINISHED")
    assert check_tracking(config, storage)[1] == []


def test_checking_a_new_store_creates_no_database(tmp_path: Path, storage: Storage) -> None:
    (tmp_path / "new").mkdir()
    assert notes(Storage(str(tmp_path / "new"))) == []
    assert not list((tmp_path / "new").iterdir())


def test_a_server_that_does_not_answer_is_refused_by_the_check(storage: Storage) -> None:
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9 does not answer"):
        check_tracking(make_config(storage.uri(""), mlflow_uri="http://127.0.0.1:9"), storage)


def test_a_run_that_is_deleted_while_it_writes_fails_in_one_line(storage: Storage, client: MlflowClient) -> None:
    """Its metrics count as lost, as with an MLflow that fails."""
    writer = open_run(storage)
    with pytest.raises(TrackingError, match="MLflow: .*must be in the 'active' state"):
        with writer.stage(Identity("data", 1, {}, {"content": "1"}, NAME), {}):
            client.delete_experiment(experiment(client).experiment_id)
            writer.log_metrics({"loss": 1.0}, 1)
    assert writer.finish("FAILED") == "1 metrics could not be written to MLflow"
    assert open_run(storage).finish("FINISHED") is None
