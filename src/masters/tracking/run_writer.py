"""Writes a distillation to MLflow: one run, with a child run for each stage, and the model's version at the end.

`metric_buffer` batches metrics, `model_publisher` registers the student, `run_lineage` makes tags and data sets, and
`pool_stage` continues a stage's run on a worker of another pool.
"""

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from urllib.parse import quote

from mlflow.entities import DatasetInput, Metric, Param, RunTag
from tenacity import retry, retry_if_exception_message, stop_after_attempt, wait_random

from masters.common import machine
from masters.common.errors import TrackingError
from masters.common.redaction import redact
from masters.config import Config
from masters.config.loading import flatten
from masters.evaluation import benchmark_results
from masters.store.artifacts import Artifact, Identity, Upstream
from masters.store.storage import Storage
from masters.tracking import locations, run_lineage
from masters.tracking.client import browser_url
from masters.tracking.client import client as mlflow_client
from masters.tracking.experiments import describe_deleted, open_experiment
from masters.tracking.locations import check_tracking_uri, default_files_folder, default_uri
from masters.tracking.metric_buffer import BATCH_SIZE, MetricBuffer
from masters.tracking.model_publisher import ModelPublisher, TrackedArtifacts
from masters.tracking.open_runs import PARENT, end_children, end_lost_runs
from masters.tracking.registry import Registry
from masters.tracking.run_lineage import artifact_tags, mlflow_key

MAX_PARAMETER_LENGTH = 500

RecordArtifact = Callable[[Artifact, dict], str]  # (artifact, outcome, rows and seconds) -> run id of the stage
# what Postgres, SQLite and MySQL say of a row that another process has just inserted
DUPLICATE_ROW = ("UniqueViolation", "UNIQUE constraint failed", "Duplicate entry")


class RunWriter:
    """Writes one run of a flow to MLflow.

    Runs have keys by which they are found again: a retry continues the run and the stages of an interrupted attempt
    instead of leaving them open.
    """

    def __init__(self, config: Config, storage: Storage, key: str = "", flow: str = "distill") -> None:
        """Open the run. `key` stays the same when the run is retried, such as the flow run's id."""
        self._connect(check_tracking_uri(config, storage))
        self.notes = describe_deleted(self.uri, config.name)  # what someone deleted in MLflow and this run restores
        self._tags = run_lineage.run_tags(config) | {"masters.store": storage.uri("")}
        # a new experiment in the default database keeps its files beside it
        files = default_files_folder(storage) if self.uri == default_uri(storage) else None
        self._experiment = open_experiment(self._client, config.name, files)
        self._tracked = TrackedArtifacts()
        end_lost_runs(self.uri, storage)
        locations.record_uri(storage, self.uri)
        tags = {"masters.stage": flow, PARENT: "yes", "masters.process": machine.this_process()}
        self.key = key or uuid.uuid4().hex
        self.run_id = self.current_run_id = self._open_run(self.key, config.name, tags)
        locations.remember_store(config.name, storage)
        values = flatten(config.model_dump()).items()
        self._client.log_batch(
            self.run_id, params=[Param(key, redact(str(value))[:MAX_PARAMETER_LENGTH]) for key, value in values]
        )

    def _connect(self, uri: str) -> None:
        self.uri, self.registry, self._client = uri, Registry(uri), mlflow_client(uri)
        self._metrics = MetricBuffer(self._client)

    def _open_run(self, key: str, name: str, tags: dict[str, str]) -> str:
        """Find the run with this key and set it to RUNNING, or create it. Returns its id."""
        tags = {mlflow_key(name): value for name, value in (self._tags | tags | {"masters.key": key}).items()}
        if found := self._client.search_runs([self._experiment], f"tags.`masters.key` = '{key}'", max_results=1):
            run_id = found[0].info.run_id
            self._client.update_run(run_id, status="RUNNING")
            self._set_tags(run_id, tags)
            return run_id
        return self._client.create_run(self._experiment, run_name=name, tags=tags).info.run_id

    def _set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        self._client.log_batch(run_id, tags=[RunTag(mlflow_key(key), value) for key, value in tags.items()])

    def nest_under(self, parent: str, name: str, tags: dict[str, str]) -> None:
        """Show this run below the run `parent`, with the name `name`."""
        self._set_tags(self.run_id, {"mlflow.parentRunId": parent, "mlflow.runName": name} | tags)

    @contextmanager
    def stage(self, identity: Identity, upstream: Upstream) -> Iterator[RecordArtifact]:
        """Open a child run for a stage, to which metrics go meanwhile. It ends as FAILED if the body raises.

        Yields a function that records the stage's artifact.
        """
        key = f"{self.run_id}/{identity.stage}/{identity.fingerprint}"
        tags = {"mlflow.parentRunId": self.run_id}
        tags |= run_lineage.stage_tags(identity, upstream, self._tracked.upstream)
        run_id = self.current_run_id = self._open_run(key, identity.stage, tags)
        self._log_inputs(run_id, run_lineage.input_datasets(upstream))

        def record_artifact(artifact: Artifact, done: dict) -> str:
            self._record_artifact(identity.stage, run_id, artifact, upstream, done)
            return run_id

        status = "FAILED"
        try:
            yield record_artifact
            status = "FINISHED"
        finally:
            self.current_run_id = self.run_id
            self._end_run(run_id, status)

    @retry(
        retry=retry_if_exception_message(match=rf".*(?:{'|'.join(DUPLICATE_ROW)})"),
        wait=wait_random(0.1, 1.0),
        stop=stop_after_attempt(5),
        reraise=True,
    )
    def _log_inputs(self, run_id: str, datasets: list[DatasetInput]) -> None:
        """Link data sets to a run. MLflow fails where another run stores the same one at the same moment."""
        self._client.log_inputs(run_id, datasets)

    def _record_artifact(self, stage: str, run_id: str, artifact: Artifact, upstream: Upstream, done: dict) -> None:
        tracked = self._tracked
        tracked.upstream[artifact.folder] = run_lineage.upstream_fingerprints(upstream, tracked.upstream)
        tracked.run_ids[artifact.folder] = run_id
        tracked.questions[artifact.folder] = run_lineage.question_dataset(upstream)
        self._tag_earlier_runs(upstream)
        self._log_inputs(run_id, run_lineage.output_datasets(artifact))
        self._set_tags(run_id, {"masters.outcome": done["outcome"]} | artifact_tags(artifact))
        values = {"fingerprint": artifact.fingerprint, "run_id": run_id}
        self._set_tags(self.run_id, {f"stage.{stage}.{name}": value for name, value in values.items()})
        self.log_metrics({"rows": float(done["rows"]), "seconds": float(done["seconds"])}, 0)

    def _tag_earlier_runs(self, upstream: Upstream) -> None:
        """Tag this run with the runs that built inputs which none of its own stages made."""
        for role, source in upstream.items():
            if not isinstance(source, Artifact) or source.folder in self._tracked.run_ids:
                continue
            if run_id := self.registry.find_building_run(self._experiment, source.fingerprint):
                self._tracked.run_ids[source.folder] = run_id
                values = {"fingerprint": source.fingerprint, "run_id": run_id}
                self._set_tags(self.run_id, {f"earlier.{role}.{name}": value for name, value in values.items()})

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        """Log metrics of the current stage, or of the whole run between stages."""
        self._metrics.add(self.current_run_id, values, step)

    @property
    def lost_metrics(self) -> int:
        """The number of metrics that MLflow did not take."""
        return self._metrics.lost

    def log_warning(self, name: str, text: str) -> None:
        """Tag the current run `masters.warning.NAME`, if MLflow answers; the artifact's record has the warning too."""
        with suppress(TrackingError):
            self._set_tags(self.current_run_id, {f"masters.warning.{name}": text})

    def log_benchmarks(self, artifact: Artifact, model: str) -> None:
        """Log a model's benchmark scores on this run and on the stage's, whether they were built or reused."""
        values, tags = benchmark_results.metrics_and_tags(model, artifact.facts["scores"], artifact.facts["lmms_eval"])
        now = time.time_ns() // 1_000_000
        metrics = [Metric(mlflow_key(name), value, now, 0) for name, value in values.items()]
        for run_id in (self.run_id, self._tracked.run_ids[artifact.folder]):
            for start in range(0, len(metrics), BATCH_SIZE):
                self._client.log_batch(run_id, metrics=metrics[start : start + BATCH_SIZE])
            self._set_tags(run_id, tags)

    def log_files(self, folder: Path) -> None:
        """Copy a local folder, under its name, to the files of this run."""
        self._client.log_artifacts(self.run_id, str(folder), folder.name)

    def register_model(self, name: str, registered: Artifact, trained: Artifact, evaluated: Artifact) -> int:
        """Register the student as a version of `name` with the alias `candidate`. Returns the version's number."""
        publisher = ModelPublisher(
            self._client, self.registry, self._experiment, self.run_id, self._tags, self._tracked
        )
        return publisher.publish(name, registered, trained, evaluated)

    def run_url(self, run_id: str) -> str | None:
        """Return the page of a run; None if MLflow has no server."""
        return self._page_url(f"experiments/{self._experiment}/runs/{run_id}")

    def model_url(self, name: str, version: int) -> str | None:
        """Return the page of a model's version; None if MLflow has no server."""
        return self._page_url(f"models/{quote(name)}/versions/{version}")

    def _page_url(self, path: str) -> str | None:
        base = browser_url(self.uri)
        return f"{base}/#/{path}" if base.startswith("http") else None

    def finish(self, status: str) -> str | None:
        """End the run as FINISHED or FAILED. Returns what could not be written to MLflow, None if all was."""
        try:
            self._end_run(self.run_id, status)
        except TrackingError as error:
            return str(error)
        finally:
            self._metrics.close()
        return f"{self.lost_metrics} metrics could not be written to MLflow" if self.lost_metrics else None

    def _end_run(self, run_id: str, status: str) -> None:
        """End a run. For a failed run, errors of MLflow are ignored: the cause of the failure must not be hidden."""
        self._metrics.flush()
        with suppress(TrackingError) if status == "FAILED" else nullcontext():
            end_children(self._client, self._experiment, run_id)  # left by an interrupt while a stage's was opened
            self._client.set_terminated(run_id, status)
