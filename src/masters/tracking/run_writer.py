"""A distillation in MLflow: one run, a child a stage with its lineage and metrics, the model's version at the end.

`run_lineage` says what goes into a stage's run, `registry` what becomes of the versions, `pool_stage` writes for a
stage that another process asked for.
"""

import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from urllib.parse import quote

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from masters.common import machine
from masters.common.errors import TrackingError
from masters.common.redaction import redact
from masters.config import Config
from masters.config.loading import flat
from masters.evaluation import benchmark_results
from masters.store.artifacts import Artifact, Identity, Upstream
from masters.store.storage import Storage
from masters.tracking import locations, run_lineage
from masters.tracking.client import browsed, check_answers, redact_uri
from masters.tracking.client import client as mlflow_client
from masters.tracking.locations import check_beside, default_uri, files_beside, tracking_uri
from masters.tracking.open_runs import PARENT, close_lost
from masters.tracking.registry import CANDIDATE, Registry
from masters.tracking.run_lineage import artifact_tags

PARAMETER_LENGTH = 500
METRICS_AT_ONCE = 200
METRICS_KEPT = 100_000  # while MLflow is away
PAUSE = 60.0  # seconds until it is tried again
CARD = "model_card.md"
STUDENT = "student-after"

Tracked = Callable[[Artifact, dict], str]  # gives the stage's run id


class RunWriter:
    """Writes one run to MLflow, a distillation or what `flow` says.

    Everything has a key and is found again by it: a run that was cut short is opened again by who goes on with it,
    and a stage that was under way then is not left running.
    """

    def __init__(self, config: Config, storage: Storage, key: str = "", flow: str = "distill") -> None:
        """`key`: what stays the same when a run is tried again, such as the flow run's id."""
        self.uri = tracking_uri(config, storage)
        check_answers(self.uri)
        if self.uri == default_uri(storage):
            check_beside(storage)
        self.registry = Registry(self.uri)
        self._client, self._storage = mlflow_client(self.uri), storage
        self._about = run_lineage.run_tags(config) | {"masters.store": storage.uri("")}
        self._experiment = self._experiment_of(config.name, storage)
        self._pending: dict[str, list[Metric]] = {}  # by run
        self.lost, self._pause = 0, 0.0  # metrics that MLflow never got; until when it is left alone
        self._reached: dict[str, dict[str, str]] = {}  # by an artifact's folder: the fingerprints behind it
        self._runs: dict[str, str] = {}  # by an artifact's folder: the run of its stage
        self._questions: dict[str, dict[str, str]] = {}  # by an artifact's folder: the data set its scores are on
        close_lost(self.uri, storage)
        locations.note(storage, redact_uri(self.uri), default_uri(storage))
        tags = {"masters.stage": flow, PARENT: "yes", "masters.process": machine.this_process()}
        self.key = key or uuid.uuid4().hex
        self.run_id = self._current = self._open(self.key, config.name, tags)
        locations.remember(config.name, self.uri)
        values = flat(config.model_dump()).items()
        self._client.log_batch(
            self.run_id, params=[Param(key, redact(str(value))[:PARAMETER_LENGTH]) for key, value in values]
        )

    def _experiment_of(self, name: str, storage: Storage) -> str:
        """Its id. A new experiment of the default database keeps its files there too."""
        ours = self.uri == default_uri(storage)
        try:
            return self._client.create_experiment(name, files_beside(storage) if ours else None)
        except MlflowException:
            found = self._client.get_experiment_by_name(name)
            if found is None:
                raise
            return found.experiment_id

    def _open(self, key: str, name: str, tags: dict[str, str]) -> str:
        """The run with this key, running: found, or created."""
        tags = {run_lineage.key(name): value for name, value in (self._about | tags | {"masters.key": key}).items()}
        if found := self._client.search_runs([self._experiment], f"tags.`masters.key` = '{key}'", max_results=1):
            run_id = found[0].info.run_id
            self._client.update_run(run_id, status="RUNNING")
            self._tag(run_id, tags)
            return run_id
        return self._client.create_run(self._experiment, run_name=name, tags=tags).info.run_id

    def _tag(self, run_id: str, tags: dict[str, str]) -> None:
        self._client.log_batch(run_id, tags=[RunTag(run_lineage.key(key), value) for key, value in tags.items()])

    def nest(self, parent: str, name: str, tags: dict[str, str]) -> None:
        """Show this run below the run `parent`, under a name of its own."""
        self._tag(self.run_id, {"mlflow.parentRunId": parent, "mlflow.runName": name} | tags)

    @property
    def current(self) -> str:
        """The run that metrics go to: the stage's under way, else the distillation's."""
        return self._current

    @contextmanager
    def stage(self, identity: Identity, upstream: Upstream) -> Iterator[Tracked]:
        """A child run for a stage, ended as FAILED if the body raises; its metrics go there meanwhile."""
        key = f"{self.run_id}/{identity.stage}/{identity.fingerprint}"
        tags = {"mlflow.parentRunId": self.run_id} | run_lineage.stage_tags(identity, upstream, self._reached)
        child = self._current = self._open(key, identity.stage, tags)
        self._client.log_inputs(child, run_lineage.inputs(upstream))

        def tracked(artifact: Artifact, done: dict) -> str:
            self._reached[artifact.folder] = run_lineage.upstream_fingerprints(upstream, self._reached)
            self._runs[artifact.folder] = child
            self._questions[artifact.folder] = run_lineage.questions(upstream)
            self._earlier(upstream)
            self._client.log_inputs(child, run_lineage.outputs(artifact))
            self._tag(child, {"masters.outcome": done["outcome"]} | artifact_tags(artifact))
            names = {"fingerprint": artifact.fingerprint, "run_id": child}
            self._tag(self.run_id, {f"stage.{identity.stage}.{name}": value for name, value in names.items()})
            self.metrics({"rows": float(done["rows"]), "seconds": float(done["seconds"])}, 0)
            return child

        status = "FAILED"
        try:
            yield tracked
            status = "FINISHED"
        finally:
            self._current = self.run_id
            self._end(child, status)

    def _earlier(self, upstream: Upstream) -> None:
        """Note on the distillation's run which runs built what it took over: a page's way on from here."""
        for role, made in upstream.items():
            if isinstance(made, Artifact) and made.folder not in self._runs and (run_id := self._built(made)):
                self._runs[made.folder] = run_id
                names = {"fingerprint": made.fingerprint, "run_id": run_id}
                self._tag(self.run_id, {f"earlier.{role}.{name}": value for name, value in names.items()})

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Metrics of the current stage; written in batches, later where MLflow is away."""
        now, pending = time.time_ns() // 1_000_000, self._pending.setdefault(self._current, [])
        pending += [Metric(run_lineage.key(name), float(value), now, step) for name, value in values.items()]
        if len(pending) >= METRICS_AT_ONCE and time.monotonic() > self._pause:
            self.flush()

    def warning(self, name: str, text: str) -> None:
        """Tag the current stage's run `masters.warning.NAME`. Left out where MLflow is away: the record has it too."""
        with suppress(TrackingError):
            self._tag(self._current, {f"masters.warning.{name}": text})

    def flush(self) -> None:
        """Write what waits. What MLflow does not take waits on, up to `METRICS_KEPT` a run; more is counted as lost."""
        for run_id, pending in self._pending.items():
            try:
                while pending:
                    self._client.log_batch(run_id, metrics=pending[:METRICS_AT_ONCE])
                    del pending[:METRICS_AT_ONCE]
            except TrackingError:
                self._pause = time.monotonic() + PAUSE
                self.lost += max(0, len(pending) - METRICS_KEPT)
                del pending[:-METRICS_KEPT]
                return

    def register_model(self, name: str, registered: Artifact, trained: Artifact, evaluated: Artifact) -> int:
        """A version of the registered model `name` with alias `candidate`. The same source is registered once."""
        if not self.registry.has(name):
            self._client.create_registered_model(name)
        source = f"{registered.uri}/model"
        version = next((v for v in self.registry.versions(name) if v.tags.get("masters.uri") == source), None)
        if version and "masters.registered" in version.tags:
            return int(version.version)
        run_id = self._builder(trained)
        tags = self._about | artifact_tags(registered) | {"masters.uri": source, "masters.run_id": self.run_id}
        if version is None:
            model = mlflow.create_external_model(
                name=name, source_run_id=run_id, tags=tags, experiment_id=self._experiment
            )
            version = self._client.create_model_version(
                name, f"models:/{model.model_id}", run_id=run_id, tags=tags, model_id=model.model_id
            )
        self._describe(name, version.version, registered)
        self._scores(evaluated, (version.source or "").removeprefix("models:/"))
        self._client.set_registered_model_alias(name, CANDIDATE, version.version)
        # last: a version without it was cut short, and is finished by the next run
        self._client.set_model_version_tag(name, version.version, "masters.registered", "yes")
        return int(version.version)

    def _builder(self, artifact: Artifact) -> str:
        """The run that built an artifact, with its metrics; this distillation's where no other is known."""
        return self._built(artifact) or self._runs.get(artifact.folder, self.run_id)

    def _built(self, artifact: Artifact) -> str | None:
        return self.registry.built(self._experiment, artifact.fingerprint)

    def _describe(self, name: str, version: str, registered: Artifact) -> None:
        """From the version's page a person reaches every stage: a list of links, as MLflow has no graph of them."""
        tags = self._client.get_run(self.run_id).data.tags
        stages, earlier = (
            {found[1]: run for key, run in tags.items() if (found := re.fullmatch(rf"{kind}\.(.+)\.run_id", key))}
            for kind in ("stage", "earlier")
        )
        for reached, made in self._reached.get(registered.folder, {}).items():
            self._client.set_model_version_tag(name, version, run_lineage.key(f"upstream.{reached}"), made)
        ordered = sorted(stages, key=lambda stage: self._client.get_run(stages[stage]).info.start_time)
        lines = [f"Student of the distillation {self._link(name, self.run_id)}, built by its stages:", ""]
        for stage in ordered:
            self._client.set_model_version_tag(name, version, f"stage.{stage}.run_id", stages[stage])
            lines.append(f"- {self._link(stage, stages[stage])} `{tags[f'stage.{stage}.fingerprint']}`")
        if earlier:
            lines += ["", "It took over what earlier runs had built:", ""]
        for role, run in earlier.items():
            lines.append(f"- {self._link(role, run)} `{tags[f'earlier.{role}.fingerprint']}`")
        lines += ["", f"Files: `{registered.uri}/model`"]
        self._client.update_model_version(name, version, "\n".join(lines))
        self._client.log_text(self.run_id, self._storage.read(f"{registered.folder}/model/README.md").decode(), CARD)

    def _link(self, text: str, run_id: str) -> str:
        return f"[{text}](#/experiments/{self._experiment}/runs/{run_id})"

    def _scores(self, evaluated: Artifact, model_id: str) -> None:
        """The evaluation's accuracies. The student's are bound to its model and to the questions that were asked."""
        now = time.time_ns() // 1_000_000
        asked = self._questions.get(evaluated.folder, {})
        for run_id in (self.run_id, self._runs.get(evaluated.folder, self.run_id)):
            for model, score in evaluated.facts["scores"].items():
                bound = dict(model_id=model_id, **asked) if model == STUDENT else asked
                metric = Metric(run_lineage.key(f"accuracy_{model}"), score["accuracy"], now, 0, run_id=run_id, **bound)
                self._client.log_batch(run_id, metrics=[metric])

    def benchmarks(self, artifact: Artifact, model: str) -> None:
        """A model's scores of an artifact `benchmarks`, on this run and on the stage's, whether built or reused."""
        values, tags = benchmark_results.logged(model, artifact.facts["scores"], artifact.facts["lmms_eval"])
        now = time.time_ns() // 1_000_000
        metrics = [Metric(run_lineage.key(name), value, now, 0) for name, value in values.items()]
        for run_id in (self.run_id, self._runs[artifact.folder]):
            for at in range(0, len(metrics), METRICS_AT_ONCE):
                self._client.log_batch(run_id, metrics=metrics[at : at + METRICS_AT_ONCE])
            self._tag(run_id, {run_lineage.key(name): value for name, value in tags.items()})

    def files(self, folder: Path) -> None:
        """Show the files of a local folder among the artifacts of the distillation's run, under its name."""
        self._client.log_artifacts(self.run_id, str(folder), folder.name)

    def page(self, run_id: str) -> str | None:
        """Where a browser finds a run; None without a server."""
        base = browsed(self.uri)
        return f"{base}/#/experiments/{self._experiment}/runs/{run_id}" if base.startswith("http") else None

    def model_page(self, name: str, version: int) -> str | None:
        """Where a browser finds a version of a registered model; None without a server."""
        base = browsed(self.uri)
        return f"{base}/#/models/{quote(name)}/versions/{version}" if base.startswith("http") else None

    def finish(self, status: str) -> str | None:
        """End the parent run: FINISHED or FAILED. Returns what MLflow could not be told, None if it knows all."""
        try:
            self._end(self.run_id, status)
        except TrackingError as error:
            return str(error)
        finally:
            self.lost += sum(map(len, self._pending.values()))
            self._pending.clear()
        return f"{self.lost} metrics could not be written to MLflow" if self.lost else None

    def _end(self, run_id: str, status: str) -> None:
        """End a run. That it failed is told if that can be done: why it failed matters more."""
        self.flush()
        with suppress(TrackingError) if status == "FAILED" else nullcontext():
            self._client.set_terminated(run_id, status)
