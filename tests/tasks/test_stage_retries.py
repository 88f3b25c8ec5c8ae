"""Retried stages: a run rebuilds a stage once, and generates a damaged shard again."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from masters.common.errors import StoreError
from masters.config.stages import Stage
from masters.store.artifacts import Artifact, Identity
from masters.tasks import evaluate
from masters.tasks.build_or_reuse import RebuildDecision, StageResult, build_or_reuse, decide_rebuild, write_file
from masters.tasks.data import data
from masters.tasks.mask import mask
from masters.tracking.registry import CHAMPION
from tests.handmade_run import first_round, make_run, read_stderr, write_predictions
from tests.shape_data import write_questions


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_questions(tmp_path / "source", 12, bad=False)


def test_retried_rebuild_keeps_its_artifact(tmp_path: Path, source: Path) -> None:
    def outcome(key: str, rebuild: bool = True) -> str:
        run = make_run(tmp_path / "store", source, key=key)
        run.stages_to_rebuild = frozenset([Stage.MASK] if rebuild else [])
        mask.fn(run, first_round(run))
        return run.stages[-1]["outcome"]

    assert outcome("first", rebuild=False) == "built"
    assert outcome("second") == "built"
    assert outcome("second") == "reused"  # the same run, tried again
    assert outcome("third") == "built"


def test_rebuild_warns_about_model_versions_made_from_the_artifact(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture
) -> None:
    run = make_run(tmp_path / "store", source, key="first")
    client, name = MlflowClient(run.tracker.uri), run.config.name
    masks = mask.fn(run, first_round(run))
    client.create_registered_model(name)
    for _ in range(2):
        client.create_model_version(name, masks.uri, tags={"upstream.mask": masks.fingerprint})
    client.set_registered_model_alias(name, CHAMPION, "2")
    again = make_run(tmp_path / "store", source, key="second")
    again.stages_to_rebuild = frozenset([Stage.MASK, Stage.DATA])
    capsys.readouterr()
    data.fn(again)
    assert "built again" not in read_stderr(capsys)
    mask.fn(again, first_round(again))
    stderr = read_stderr(capsys)
    assert f"mask, from which models:/{name}/2 (champion) was made, is built again" in stderr
    assert f"models:/{name}/1" not in stderr


@pytest.mark.parametrize("size", [0, 100])
def test_damaged_shard_is_removed_and_generated_again(tmp_path: Path, source: Path, size: int) -> None:
    run = make_run(tmp_path / "store", source)
    questions, models = data.fn(run), [replace(run.resources.student, name="student-before")]
    write_predictions(run, questions, models)
    [request, *_] = evaluate.prediction_requests(run, questions, models)
    os.truncate(run.storage.path(request.file), size)
    with pytest.raises(StoreError, match=f"{request.fingerprint}.parquet: expected .* rows, found no Parquet file"):
        evaluate.evaluate.fn(run, questions, models)
    assert not run.storage.exists(request.file)
    write_predictions(run, questions, models)
    assert evaluate.evaluate.fn(run, questions, models).facts["scores"]["student-before"]["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("is_requested", "is_outdated", "is_newer_than_run", "decision"),
    [
        (False, False, False, RebuildDecision.KEEP),
        (False, True, False, RebuildDecision.OUTDATED),
        (False, True, True, RebuildDecision.OUTDATED),
        (True, False, False, RebuildDecision.REQUESTED),
        (True, False, True, RebuildDecision.KEEP),  # another run has just rebuilt it
        (True, True, True, RebuildDecision.REQUESTED),
    ],
)
def test_rebuild_decision(
    is_requested: bool, is_outdated: bool, is_newer_than_run: bool, decision: RebuildDecision
) -> None:
    assert decide_rebuild(is_requested, is_outdated, is_newer_than_run) is decision


@pytest.mark.parametrize("content", [b"the same", b"other"])
def test_rebuild_with_other_content_rebuilds_dependent_stages(tmp_path: Path, source: Path, content: bytes) -> None:
    def outcomes(key: str, content: bytes, rebuild: bool = False) -> list[str]:
        run = make_run(tmp_path / "store", source, key=key)
        run.stages_to_rebuild = frozenset([Stage.MASK] if rebuild else [])
        previous: Artifact | None = None
        for stage in ("mask", "train", "evaluate"):
            inputs = {previous.folder: previous.fingerprint} if previous else {}
            identity = Identity(stage, 1, {}, inputs)
            rows = content + (bytes(previous.record["digest"], "ascii") if previous else b"")

            def build(identity: Identity = identity, rows: bytes = rows) -> StageResult:
                return StageResult(write_file(run.storage, identity, "rows", rows))

            previous = build_or_reuse(run, identity, dict(before=previous) if previous else {}, build)
            assert run.storage.read(f"{identity.folder}/rows") == rows
        return [entry["outcome"] for entry in run.stages]

    assert outcomes("first", b"the same") == ["built"] * 3
    dependent = "reused" if content == b"the same" else "built"
    assert outcomes("second", content, rebuild=True) == ["built", dependent, dependent]
    assert outcomes("third", content) == ["reused"] * 3
