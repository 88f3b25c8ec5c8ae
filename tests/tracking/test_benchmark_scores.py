"""Scores of benchmarks in MLflow on SQLite, whatever a model is called."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from masters.store.artifacts import Identity, commit
from masters.store.storage import Storage
from masters.tracking.run_writer import RunWriter
from tests.tracked_run import NAME, configured

FIELDS = ("benchmark", "task", "version", "metric", "filter", "value", "standard_error", "n")
SCORES = [
    dict(zip(FIELDS, row, strict=True))
    for row in (
        ("b", "one", "1.0", "exact_match", "none", 0.75, 0.1, 4),
        ("b", "one", "1.0", "exact_match", "strict", 0.5, None, 4),
        ("b", "two(a,b)", "unversioned", "judged", "none", 0.0, None, None),
    )
]


NAMED = {
    "demo/models/student": "demo/models/student", "/runs/student": "runs/student", "../there": "-/there",
    "models:/easyvqa@champion": "models:/easyvqa-champion",
}  # fmt: skip
LONG = "/".join(["a-long-folder"] * 40)


def test_every_score_has_a_name_that_mlflow_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "store").mkdir()
    storage, identity = Storage(str(tmp_path / "store")), Identity("benchmarks", 1, {}, {}, NAME)
    tracker = RunWriter(configured(tmp_path / "store"), storage, flow="evaluate")
    with tracker.stage(identity, {}) as tracked:
        artifact = commit(storage, identity, {}, dict(scores=SCORES, lmms_eval="0.7.3"), {})
        stage = tracked(artifact, dict(outcome="built", rows=4, seconds=0.1))
    for model in (*NAMED, LONG):
        tracker.benchmarks(artifact, model)

    for run_id in (tracker.run_id, stage):
        run = MlflowClient(tracker.uri).get_run(run_id).data
        for named in NAMED.values():
            assert {
                f"{named}/one/exact_match": 0.75, f"{named}/one/exact_match/standard_error": 0.1,
                f"{named}/one/exact_match/strict": 0.5, f"{named}/two-a-b-/judged": 0.0,
            }.items() <= run.metrics.items()  # fmt: skip
        assert sum(name.startswith("a-long-folder") for name in run.metrics) == 4  # none hides another
        assert run.tags["benchmark.one.version"] == "1.0"
        assert run.tags["benchmark.two-a-b-.version"] == "unversioned"
        assert run.tags["benchmark.lmms-eval"] == "0.7.3"
