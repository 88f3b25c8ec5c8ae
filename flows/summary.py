"""summary.json: what a run did, kept at the store's root."""

import json

from masters.common.redaction import redact
from masters.store.artifacts import Artifact
from masters.tasks.judges import accuracy_metric
from masters.tasks.run_context import Run
from masters.tracking.client import redact_uri


class Summary:
    """Collects the results of a run; `write` stores them."""

    def __init__(self, run: Run, flow_run_id: str) -> None:
        self._run, self._flow_run_id = run, flow_run_id
        self._scores: dict = {}
        self._model: dict = {}
        self._night: dict = {}
        self.written: dict = {}

    def scores(self, evaluated: Artifact, trained: Artifact) -> None:
        """What accuracy is called and on which split it is; teachers', student's before and after, each with where the
        model lies."""
        resources, scores = self._run.resources, evaluated.facts["scores"]
        after = self._run.storage.uri(f"{trained.folder}/model")
        self._scores = dict(
            metric=accuracy_metric(self._run.config),
            split=self._run.config.evaluate.split,
            teachers=[dict(name=t.name, uri=str(t.folder), **scores[t.name]) for t in resources.teachers],
            student=dict(
                before=dict(uri=str(resources.student.folder), **scores["student-before"]),
                after=dict(uri=after, **scores["student-after"]),
            ),
        )

    @property
    def version(self) -> int | None:
        """Of the registered model."""
        return self._model.get("model_version")

    def registered(self, artifact: Artifact, version: int) -> None:
        """The model's version, and the exported folder with its card as the student's place."""
        self._model = dict(model_name=self._run.config.name, model_version=version)
        self._scores["student"]["after"]["uri"] = f"{artifact.uri}/model"

    def night(self, told: dict) -> None:
        """What a night came to: its outcome and the comparison with the champion."""
        self._night = dict(nightly=told)

    def write(self, status: str, error: str | None = None) -> None:
        tracker = self._run.tracker
        mlflow = dict(
            run_id=tracker.run_id, tracking_uri=redact_uri(tracker.uri), metrics_lost=tracker.lost, **self._model
        )
        self.written = dict(
            run_id=tracker.run_id, name=self._run.config.name, status=status, stages=self._run.stages, **self._scores,
            **self._night, mlflow=mlflow, prefect=dict(flow_run_id=self._flow_run_id),
            **({"error": redact(error)} if error else {}),
        )  # fmt: skip
        self._run.storage.write("summary.json", json.dumps(self.written, indent=1).encode())
