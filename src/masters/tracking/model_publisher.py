"""Registers a student as a version of a registered model, with its scores and links to the runs that built it."""

import re
import time
from dataclasses import dataclass, field

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

from masters.store.artifacts import Artifact
from masters.tracking.registry import CANDIDATE, Registry
from masters.tracking.run_lineage import artifact_tags, mlflow_key

MODEL_CARD = "model_card.md"
STUDENT = "student-after"


@dataclass
class TrackedArtifacts:
    """Artifacts that a run's stages built or reused, each by the artifact's folder."""

    run_ids: dict[str, str] = field(default_factory=dict)  # the stage's run
    upstream: dict[str, dict[str, str]] = field(default_factory=dict)  # fingerprints of everything upstream
    questions: dict[str, dict[str, str]] = field(default_factory=dict)  # the data set that its scores refer to


@dataclass
class ModelPublisher:
    """Publishes the student of one run. Doing it again after an interruption finishes the same version."""

    client: MlflowClient
    registry: Registry
    experiment: str
    run_id: str
    tags: dict[str, str]  # of every model version
    tracked: TrackedArtifacts

    def publish(self, name: str, registered: Artifact, trained: Artifact, evaluated: Artifact) -> int:
        """Register the model once as a version of `name` with the alias `candidate`. Returns the version's number."""
        if not self.registry.has(name):
            self._create_model(name)
        source = f"{registered.uri}/model"
        version = next((v for v in self.registry.versions(name) if v.tags.get("masters.uri") == source), None)
        if version and "masters.registered" in version.tags:
            return int(version.version)
        if version is None:
            version = self._create_version(name, source, registered, trained)
        self._describe_version(name, version.version, registered)
        self._log_scores(evaluated, (version.source or "").removeprefix("models:/"))
        self.client.set_registered_model_alias(name, CANDIDATE, version.version)
        # set last: a version without this tag was interrupted, and the next run finishes it
        self.client.set_model_version_tag(name, version.version, "masters.registered", "yes")
        return int(version.version)

    def _create_model(self, name: str) -> None:
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):  # by another run, meanwhile
                raise

    def _create_version(self, name: str, source: str, registered: Artifact, trained: Artifact) -> ModelVersion:
        built = self.registry.find_building_run(self.experiment, trained.fingerprint)
        run_id = built or self.tracked.run_ids.get(trained.folder, self.run_id)
        tags = self.tags | artifact_tags(registered) | {"masters.uri": source, "masters.run_id": self.run_id}
        model = mlflow.create_external_model(name=name, source_run_id=run_id, tags=tags, experiment_id=self.experiment)
        return self.client.create_model_version(
            name, f"models:/{model.model_id}", run_id=run_id, tags=tags, model_id=model.model_id
        )

    def _describe_version(self, name: str, version: str, registered: Artifact) -> None:
        """Write the version's lineage into its tags, and links to all stages into its description."""
        tags = self.client.get_run(self.run_id).data.tags
        stages, earlier = (
            {match[1]: run for key, run in tags.items() if (match := re.fullmatch(rf"{kind}\.(.+)\.run_id", key))}
            for kind in ("stage", "earlier")
        )
        for stage, fingerprint in self.tracked.upstream.get(registered.folder, {}).items():
            self.client.set_model_version_tag(name, version, mlflow_key(f"upstream.{stage}"), fingerprint)
        lines = [f"Student of the distillation {self._link(name, self.run_id)}, built by its stages:", ""]
        for stage in sorted(stages, key=lambda stage: self.client.get_run(stages[stage]).info.start_time):
            self.client.set_model_version_tag(name, version, f"stage.{stage}.run_id", stages[stage])
            lines.append(f"- {self._link(stage, stages[stage])} `{tags[f'stage.{stage}.fingerprint']}`")
        if earlier:
            lines += ["", "Artifacts reused from earlier runs:", ""]
        for role, run in earlier.items():
            lines.append(f"- {self._link(role, run)} `{tags[f'earlier.{role}.fingerprint']}`")
        lines += ["", f"Files: `{registered.uri}/model`"]
        self.client.update_model_version(name, version, "\n".join(lines))
        card = registered.storage.read(f"{registered.folder}/model/README.md").decode()
        self.client.log_text(self.run_id, card, MODEL_CARD)

    def _link(self, text: str, run_id: str) -> str:
        return f"[{text}](#/experiments/{self.experiment}/runs/{run_id})"

    def _log_scores(self, evaluated: Artifact, model_id: str) -> None:
        """Log the evaluation's accuracies. The student's refer to its logged model and to the questions."""
        now = time.time_ns() // 1_000_000
        questions = self.tracked.questions.get(evaluated.folder, {})
        for run_id in (self.run_id, self.tracked.run_ids.get(evaluated.folder, self.run_id)):
            for model, score in evaluated.facts["scores"].items():
                references = dict(model_id=model_id, **questions) if model == STUDENT else questions
                name = mlflow_key(f"accuracy_{model}")
                metric = Metric(name, score["accuracy"], now, 0, run_id=run_id, **references)
                self.client.log_batch(run_id, metrics=[metric])
