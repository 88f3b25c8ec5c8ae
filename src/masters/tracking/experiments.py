"""The MLflow experiment of a configuration's name: found, created, or restored if someone deleted it."""

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, ViewType
from mlflow.exceptions import MlflowException

from masters.common.errors import InputError, TrackingError, one_line
from masters.config import Config
from masters.store.storage import Storage
from masters.tracking import locations
from masters.tracking.client import client as mlflow_client
from masters.tracking.client import redact_uri
from masters.tracking.database import is_new_database
from masters.tracking.registry import Registry

REGISTER_RUNS = "tags.`masters.stage` = 'register' and attributes.status = 'FINISHED'"


def open_experiment(client: MlflowClient, name: str, files: str | None) -> str:
    """Find or create the experiment of this name, and restore it if it is deleted. Returns its id.

    `files` is the folder or URI for the files of a new experiment's runs; None leaves it to MLflow.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, files)
        except MlflowException:  # another run has created it meanwhile
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == LifecycleStage.DELETED:
        _restore(client, name, found.experiment_id)
    return found.experiment_id


def _restore(client: MlflowClient, name: str, experiment: str) -> None:
    try:
        client.restore_experiment(experiment)
    except (MlflowException, TrackingError) as error:
        if client.get_experiment(experiment).lifecycle_stage == LifecycleStage.ACTIVE:
            return  # another run has restored it meanwhile
        raise InputError(
            f"experiment {name} is deleted in MLflow and cannot be restored by this run: {one_line(error)}; restore "
            "it there, or choose another name"
        ) from error


def describe_deleted(uri: str, name: str) -> list[str]:
    """Return a note for each of the experiment and the registered model of this name that someone deleted in MLflow.

    MLflow keeps deleted experiments, which a run restores. It forgets registered models, but not the runs of the stage
    register, even if they are deleted themselves.
    """
    client, place = mlflow_client(uri), f"MLflow at {redact_uri(uri)}"
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return []
    notes = []
    if experiment.lifecycle_stage == LifecycleStage.DELETED:
        notes.append(
            f"experiment {name} is deleted in {place}: a run restores it with its runs; to leave it deleted, choose "
            "another name"
        )
    if client.search_runs([experiment.experiment_id], REGISTER_RUNS, ViewType.ALL, 1) and not Registry(uri).has(name):
        notes.append(
            f"the registered model {name} is deleted in {place}: the next student is registered as its version 1, and "
            "there is no champion to compare it with"
        )
    return notes


def check_tracking(config: Config, storage: Storage) -> tuple[str, list[str]]:
    """Check before a run that its MLflow can be used. Returns its address, and notes on what was deleted there.

    Raises InputError if it cannot be reached or written. Creates no tables in a new SQLite database.
    """
    uri = locations.check_tracking_uri(config, storage)
    return uri, [] if is_new_database(uri) else describe_deleted(uri, config.name)
