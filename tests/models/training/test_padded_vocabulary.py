"""Rows of the head beyond the tokenizer's last entry stand for no token: a training with them is one without them."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from masters.models.packing.prefix_tree import TokenCounts
from masters.models.training import history, trainer
from masters.models.training.groups import Step
from masters.models.training.history import HistoryWriter
from masters.store import artifacts
from masters.store.storage import Storage
from tests.models.padded_models import pad_model
from tests.models.paper import paper_train
from tests.models.tiny_contexts import make_context

PADDING = {"student": 12, "teacher": 40, "reference": 12}  # rows; the student and its reference are one architecture
SETTINGS: dict[str, dict[str, Any]] = {  # each divergence; pi_ref in memory, stored, and none
    "jsd": dict(divergence="jsd", kl="exact"),
    "kl": dict(divergence="kl", kl="squared", negatives="clipped"),
    "skew": dict(divergence="skew", beta=0.0),
    "kd": dict(objective="kd"),
    "sft": dict(objective="sft"),
}


def training_of(folder: Path, padded: bool, settings: dict[str, Any]) -> trainer.TrainContext:
    """Return two steps of a run of tiny models."""
    base = make_context("qwen3_vl")
    models = dict(student=base.student, teacher=base.teacher, reference=base.reference)
    train = paper_train(**dict(learning_rate=1e-3) | settings)
    made = {name: pad_model(m, PADDING[name]) if padded else copy.deepcopy(m) for name, m in models.items()}
    if train.objective == "sft":
        made["teacher"] = None
    if not train.holds_reference:
        made["reference"] = None
    return replace(
        base,
        **made,
        train=train,
        vocabulary=base.student.lm_head.weight.shape[0] if padded else None,
        steps=[Step(0, 0, (0, 1, 2, 3)), Step(0, 0, (4, 5, 6, 7))],
        storage=Storage(str(folder)),
        checkpoints="checkpoints",
        history=HistoryWriter(),
        token_counts=TokenCounts(),
        probe=[base.question(group) for group in base.groups[:4]],
    )


def read_rows(context: trainer.TrainContext, table: str) -> list[dict]:
    files = history.files(context.storage, "checkpoints", table)
    return [row for content in files for row in artifacts.tables.decode(content).to_pylist()]


@pytest.mark.parametrize("name", SETTINGS)
def test_padding_changes_neither_weights_nor_what_is_recorded(name: str, tmp_path: Path) -> None:
    plain, padded = (training_of(tmp_path / kind, kind == "padded", SETTINGS[name]) for kind in ("plain", "padded"))
    before = padded.student.lm_head.weight.detach().clone()
    for context in (plain, padded):
        trainer.fit(context)
    for table in history.SCHEMAS:
        assert repr(read_rows(padded, table)) == repr(read_rows(plain, table))  # NaN equals NaN
    vocabulary = plain.student.lm_head.weight.shape[0]
    trained = dict(padded.student.named_parameters())
    for path, expected in plain.student.named_parameters():
        assert torch.equal(trained[path][: len(expected)], expected), path
    assert torch.equal(padded.student.lm_head.weight[vocabulary:], before[vocabulary:])
    assert not torch.equal(padded.student.lm_head.weight[:vocabulary], before[:vocabulary])


def test_padding_would_show(tmp_path: Path) -> None:
    """The garbage is loud enough for the test above to fail where one model's rows counted."""
    context = training_of(tmp_path, True, SETTINGS["jsd"])
    trainer.fit(replace(context, vocabulary=None))
    divergences = [row["divergence"] for row in read_rows(context, "rewards")]
    assert min(divergences) > 0.1
