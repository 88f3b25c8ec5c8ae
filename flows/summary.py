"""The summary of a run: `summary.json` at the root of the store."""

import json

from masters.checks.model_folder import STUDENT_AFTER, STUDENT_BEFORE
from masters.common.redaction import redact
from masters.store.artifacts import Artifact
from masters.tasks.judges import accuracy_metric
from masters.tasks.run_context import Run
from masters.tracking.client import redact_uri


class Summary:
    """Collects the results of a run and writes them to `summary.json` at the root of the store."""

    def __init__(self, run: Run, flow_run_id: str) -> None:
        self._run, self._flow_run_id = run, flow_run_id
        self._scores: dict = {}
        self._model: dict = {}
        self._night: dict = {}
        self.content: dict = {}  # what `write` has written

    def set_scores(self, evaluated: Artifact, trained: Artifact) -> None:
        """Add the accuracy of the teachers and of the student before and after training, with the models' URIs."""
        resources, scores = self._run.resources, evaluated.facts["scores"]
        trained_uri = self._run.storage.uri(f"{trained.folder}/model")
        self._scores = dict(
            metric=accuracy_metric(self._run.config),
            split=self._run.config.evaluate.split,
            teachers=[dict(name=t.name, uri=str(t.folder), **scores[t.name]) for t in resources.teachers],
            student=dict(
                before=dict(uri=str(resources.student.folder), **scores[STUDENT_BEFORE]),
                after=dict(uri=trained_uri, **scores[STUDENT_AFTER]),
            ),
        )

    @property
    def version(self) -> int | None:
        """Version of the registered model, None before it is registered."""
        return self._model.get("model_version")

    def set_registered_model(self, artifact: Artifact, version: int) -> None:
        """Add the registered version. The student's URI becomes the exported folder, which has the model card."""
        self._model = dict(model_name=self._run.config.name, model_version=version)
        self._scores["student"]["after"]["uri"] = f"{artifact.uri}/model"

    def set_night(self, decision: dict) -> None:
        """Add the outcome of a night."""
        self._night = dict(nightly=decision)

    def write(self, status: str, error: str | None = None) -> None:
        tracker = self._run.tracker
        self.content = dict(
            run_id=tracker.run_id,
            name=self._run.config.name,
            status=status,
            stages=self._run.stages,
            **self._scores,
            **self._night,
            mlflow=dict(
                run_id=tracker.run_id,
                tracking_uri=redact_uri(tracker.uri),
                metrics_lost=tracker.lost_metrics,
                **self._model,
            ),
            prefect=dict(flow_run_id=self._flow_run_id),
            **({"error": redact(error)} if error else {}),
        )
        self._run.storage.write("summary.json", json.dumps(self.content, indent=1).encode())
