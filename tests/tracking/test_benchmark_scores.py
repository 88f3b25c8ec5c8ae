"""Benchmark scores in MLflow on SQLite, for models with any name."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from masters.store.artifacts import Identity, commit
from masters.store.storage import Storage
from masters.tracking.run_writer import RunWriter
from tests.tracked_run import NAME, make_config

FIELDS = ("benchmark", "task", "version", "metric", "filter", "value", "standard_error", "n")
SCORES = [
    dict(zip(FIELDS, row, strict=True))
    for row in (
        ("b", "one", "1.0", "exact_match", "none", 0.75, 0.1, 4),
        ("b", "one", "1.0", "exact_match", "strict", 0.5, None, 4),
        ("b", "two(a,b)", "unversioned", "judged", "none", 0.0, None, None),
    )
]


KEYS = {
    "demo/models/student": "demo/models/student", "/runs/student": "runs/student", "../there": "-/there",
    "models:/easyvqa@champion": "models:/easyvqa-champion",
}  # fmt: skip
LONG = "/".join(["a-long-folder"] * 40)


def test_every_score_has_a_valid_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "store").mkdir()
    storage, identity = Storage(str(tmp_path / "store")), Identity("benchmarks", 1, {}, {}, NAME)
    writer = RunWriter(make_config(tmp_path / "store"), storage, flow="evaluate")
    with writer.stage(identity, {}) as record_artifact:
        artifact = commit(storage, identity, {}, dict(scores=SCORES, lmms_eval="0.7.3"), {})
        stage_run = record_artifact(artifact, dict(outcome="built", rows=4, seconds=0.1))
    for model in (*KEYS, LONG):
        writer.log_benchmarks(artifact, model)

    for run_id in (writer.run_id, stage_run):
        run = MlflowClient(writer.uri).get_run(run_id).data
        for key in KEYS.values():
            assert {
                f"{key}/one/exact_match": 0.75, f"{key}/one/exact_match/standard_error": 0.1,
                f"{key}/one/exact_match/strict": 0.5, f"{key}/two-a-b-/judged": 0.0,
            }.items() <= run.metrics.items()  # fmt: skip
        assert sum(name.startswith("a-long-folder") for name in run.metrics) == 4  # no two have the same name
        assert run.tags["benchmark.one.version"] == "1.0"
        assert run.tags["benchmark.two-a-b-.version"] == "unversioned"
        assert run.tags["benchmark.lmms-eval"] == "0.7.3"
