"""MLflow, the only place that imports it: one run a distillation, a child a stage, metrics, the model's versions."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from masters.artifacts import Artifact, Identity
from masters.config import Config
from masters.errors import InputError
from masters.storage import Storage

PARAMETER_LENGTH = 500
METRICS_AT_ONCE = 200

Tracked = Callable[[Artifact, dict], None]


def tracking_uri(config: Config, storage: Storage) -> str:
    """runtime.mlflow_uri, else MLFLOW_TRACKING_URI, else a SQLite file beside the artifacts (S3: in this folder)."""
    return config.runtime.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") or beside(storage)


def check_answers(uri: str) -> None:
    """Raises InputError if an MLflow server is named and does not answer: its client would retry for minutes."""
    if not uri.startswith(("http://", "https://")):
        return
    try:
        with urlopen(f"{uri.rstrip('/')}/health", timeout=10):
            pass
    except (OSError, ValueError) as error:
        raise InputError(
            f"MLflow at {uri} does not answer ({error}): start it, or choose another with runtime.mlflow_uri or "
            "MLFLOW_TRACKING_URI"
        ) from error


def beside(storage: Storage) -> str:
    return f"sqlite:///{storage.path('mlflow.db') if storage.local else Path('mlflow.db').absolute()}"


def check_beside(storage: Storage) -> None:
    """Raises InputError if the default database cannot be made: unlike the store, the working folder is not proven."""
    try:
        Path(beside(storage).removeprefix("sqlite:///")).touch()
    except OSError as error:
        raise InputError(
            f"the tracking database of a run goes into the working folder, which cannot be written: {error}; "
            "set runtime.mlflow_uri or MLFLOW_TRACKING_URI, or start elsewhere"
        ) from error


def files_beside(storage: Storage) -> str:
    """Where a new experiment of that database keeps its files: on this machine too, S3 would ask for a client more."""
    return storage.path("mlflow") if storage.local else str(Path("mlruns").absolute())


def registered_uri(uri: str, model: str) -> str:
    """Where the student of `models:/NAME@ALIAS` or `models:/NAME/VERSION` lies. Raises InputError if there is none."""
    client, rest = MlflowClient(uri), model.removeprefix("models:/")
    name, at, alias = rest.partition("@")
    try:
        if at:
            version = client.get_model_version_by_alias(name, alias)
        else:
            version = client.get_model_version(*rest.rsplit("/", 1))
        return version.tags["masters.uri"]
    except (MlflowException, TypeError, KeyError) as error:
        raise InputError(
            f"{model}: expected models:/NAME@ALIAS or models:/NAME/VERSION of a student registered at {uri} ({error})"
        ) from None


class Tracker:
    """Writes one run to MLflow, a distillation or what `flow` says."""

    def __init__(self, config: Config, storage: Storage, flow: str = "distill") -> None:
        self.uri = tracking_uri(config, storage)
        check_answers(self.uri)
        if self.uri == beside(storage):
            check_beside(storage)
        mlflow.set_tracking_uri(self.uri)
        self._client = MlflowClient(self.uri)
        self._experiment = self._experiment_of(config.name, storage)
        self._pending: list[Metric] = []
        run = self._client.create_run(self._experiment, run_name=config.name, tags={"masters.stage": flow})
        self.run_id = self._current = run.info.run_id
        for key, value in _flat(config.model_dump()).items():
            self._client.log_param(self.run_id, key, str(value)[:PARAMETER_LENGTH])

    def _experiment_of(self, name: str, storage: Storage) -> str:
        """Its id. A new experiment of the default database keeps its files there too."""
        found = self._client.get_experiment_by_name(name)
        if found:
            return found.experiment_id
        ours = self.uri == beside(storage)
        return self._client.create_experiment(name, files_beside(storage) if ours else None)

    @contextmanager
    def stage(self, identity: Identity) -> Iterator[Tracked]:
        """A child run for a stage, ended as FAILED if the body raises; its metrics go there meanwhile."""
        tags = {
            "mlflow.parentRunId": self.run_id,
            "masters.stage": identity.stage,
            "masters.fingerprint": identity.fingerprint,
        }
        child = self._client.create_run(self._experiment, run_name=identity.stage, tags=tags).info.run_id
        self._current = child

        def tracked(artifact: Artifact, done: dict) -> None:
            for key in ("outcome", "uri"):
                self._client.set_tag(child, f"masters.{key}", str(done[key]))
            self._client.set_tag(self.run_id, f"stage.{identity.stage}.fingerprint", artifact.fingerprint)
            self._client.set_tag(self.run_id, f"stage.{identity.stage}.run_id", child)
            self.metrics({"rows": float(done["rows"]), "seconds": float(done["seconds"])}, 0)

        status = "FAILED"
        try:
            yield tracked
            status = "FINISHED"
        finally:
            self.flush()
            self._client.set_terminated(child, status)
            self._current = self.run_id

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Metrics of the current stage; written in batches."""
        now = time.time_ns() // 1_000_000
        self._pending += [Metric(name, float(value), now, step) for name, value in values.items()]
        if len(self._pending) >= METRICS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        for at in range(0, len(self._pending), METRICS_AT_ONCE):
            self._client.log_batch(self._current, metrics=self._pending[at : at + METRICS_AT_ONCE])
        self._pending.clear()

    def register_model(self, name: str, uri: str, scores: dict[str, dict]) -> int:
        """A version of the registered model `name` with alias `candidate`. The same source is registered once."""
        if not self._client.search_registered_models(f"name = '{name}'"):
            self._client.create_registered_model(name)
        for version in self._client.search_model_versions(f"name = '{name}'"):
            if version.tags.get("masters.uri") == uri:
                return int(version.version)
        tags = {"masters.uri": uri}
        external = mlflow.create_external_model(
            name=name, source_run_id=self.run_id, tags=tags, experiment_id=self._experiment
        )
        version = self._client.create_model_version(
            name, f"models:/{external.model_id}", run_id=self.run_id, tags=tags, model_id=external.model_id
        )
        self._client.set_registered_model_alias(name, "candidate", version.version)
        for model, score in scores.items():
            self._client.log_metric(self.run_id, f"accuracy_{model}", score["accuracy"])
        return int(version.version)

    def finish(self, status: str) -> None:
        """End the parent run: FINISHED or FAILED."""
        self.flush()
        self._client.set_terminated(self.run_id, status)


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
