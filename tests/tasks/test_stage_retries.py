"""Stages that are tried again: a rebuild removes once a run; a shard that a power cut damaged is answered again."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from masters.common.errors import StoreError
from masters.common.hashing import digest
from masters.config.stages import Stage
from masters.store.artifacts import Artifact, Identity
from masters.tasks import evaluate
from masters.tasks.build import build_or_reuse
from masters.tasks.data import data
from masters.tasks.mask import mask
from masters.tracking.registry import CHAMPION
from tests.handmade_run import first_round, made_run, predicted, told
from tests.shape_data import write_questions


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_questions(tmp_path / "source", 12, bad=False)


def test_a_rebuild_that_is_tried_again_keeps_what_it_built(tmp_path: Path, source: Path) -> None:
    def outcome(key: str, rebuild: bool = True) -> str:
        run = made_run(tmp_path / "store", source, key=key)
        run.rebuild = frozenset([Stage.MASK] if rebuild else [])
        mask.fn(run, first_round(run))
        return run.stages[-1]["outcome"]

    assert outcome("first", rebuild=False) == "built"
    assert outcome("second") == "built"
    assert outcome("second") == "reused"  # the same run, tried again
    assert outcome("third") == "built"


def test_who_rebuilds_what_a_version_with_an_alias_was_made_from_is_warned(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture
) -> None:
    run = made_run(tmp_path / "store", source, key="first")
    client, name = MlflowClient(run.tracker.uri), run.config.name
    masks = mask.fn(run, first_round(run))
    client.create_registered_model(name)
    for _ in range(2):
        client.create_model_version(name, masks.uri, tags={"upstream.mask": masks.fingerprint})
    client.set_registered_model_alias(name, CHAMPION, "2")
    again = made_run(tmp_path / "store", source, key="second")
    again.rebuild = frozenset([Stage.MASK, Stage.DATA])
    capsys.readouterr()
    data.fn(again)
    assert "built again" not in told(capsys)
    mask.fn(again, first_round(again))
    assert f"mask of models:/{name}/2 (champion) is built again" in (said := told(capsys))
    assert f"models:/{name}/1" not in said


@pytest.mark.parametrize("size", [0, 100])
def test_a_damaged_shard_is_removed_and_answered_again(tmp_path: Path, source: Path, size: int) -> None:
    run = made_run(tmp_path / "store", source)
    questions, models = data.fn(run), [replace(run.ready.student, name="student-before")]
    predicted(run, questions, models)
    [order, *_] = evaluate.orders(run, questions, models)
    os.truncate(run.storage.path(order.file), size)
    with pytest.raises(StoreError, match=f"{order.fingerprint}.parquet: expected .* rows, found no Parquet file"):
        evaluate.evaluate.fn(run, questions, models)
    assert not run.storage.exists(order.file)
    predicted(run, questions, models)
    assert evaluate.evaluate.fn(run, questions, models).facts["scores"]["student-before"]["accuracy"] == 1.0


@pytest.mark.parametrize("rows", [b"the same", b"others"])
def test_a_rebuild_reaches_what_was_made_from_it_where_it_came_out_different(
    tmp_path: Path, source: Path, rows: bytes
) -> None:
    def outcomes(key: str, content: bytes, rebuild: bool = False) -> list[str]:
        run = made_run(tmp_path / "store", source, key=key)
        run.rebuild = frozenset([Stage.MASK] if rebuild else [])
        made: dict[str, Artifact] = {}
        for stage in ("mask", "train", "evaluate"):
            before = list(made.values())[-1:]
            made_of = Identity(stage, 1, {}, {one.folder: one.fingerprint for one in before})
            text = content + b"".join(b" of " + bytes(one.record["digest"], "ascii") for one in before)

            def build(folder: str = made_of.folder, text: bytes = text) -> tuple[dict[str, str], dict, dict]:
                run.storage.write(f"{folder}/rows", text)
                return dict(rows=digest(text)), {}, {}

            made[stage] = build_or_reuse(run, made_of, dict(before=before[0]) if before else {}, build)
            assert run.storage.read(f"{made_of.folder}/rows") == text
        return [line["outcome"] for line in run.stages]

    assert outcomes("first", b"the same") == ["built"] * 3
    assert outcomes("second", rows, rebuild=True) == [
        "built",
        *(["reused"] * 2 if rows == b"the same" else ["built"] * 2),
    ]
    assert outcomes("third", rows) == ["reused"] * 3
