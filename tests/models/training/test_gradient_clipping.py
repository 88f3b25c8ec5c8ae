"""Gradient clipping equals PyTorch's. With sharded ranks it is tested in tests/models/distributed/test_sharding.py."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from masters.models.packing.prefix_tree import TokenCounts
from masters.models.training import trainer
from masters.models.training.gradient_clipping import clip_gradient
from masters.models.training.groups import Step
from masters.models.training.history import HistoryWriter
from masters.models.training.lr_schedule import learning_rate
from masters.store import tables
from masters.store.storage import Storage
from tests.models.paper import paper_train
from tests.models.tiny_contexts import gradient, make_context, references

FAMILY = "qwen3_vl"


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_a_gradient_is_clipped_as_pytorch_does(limit: float) -> None:
    base = make_context(FAMILY)
    context = replace(base, student=copy.deepcopy(base.student), token_counts=TokenCounts())
    trainer.run_step(context, Step(0, 0, tuple(range(8))), references(context))
    clipped_by_pytorch = copy.deepcopy(context.student)
    for parameter, copied in zip(context.student.parameters(), clipped_by_pytorch.parameters(), strict=True):
        copied.grad = None if parameter.grad is None else parameter.grad.clone()
    norm = clip_gradient(context, limit)
    assert norm == pytest.approx(
        torch.nn.utils.clip_grad_norm_(clipped_by_pytorch.parameters(), limit).item(), rel=1e-5
    )
    torch.testing.assert_close(gradient(context.student), gradient(clipped_by_pytorch))
    assert gradient(context.student).norm() <= limit * 1.0001


def test_history_has_the_learning_rate_and_the_gradient_norm_of_each_step(tmp_path: Path) -> None:
    base, storage = make_context(FAMILY), Storage(str(tmp_path))
    train = paper_train(learning_rate=1e-3, schedule="cosine", warmup_steps=2, max_gradient_norm=0.05)
    context = replace(
        base,
        student=copy.deepcopy(base.student),
        train=train,
        steps=[Step(0, 0, (0, 1, 2, 3))] * 5,
        storage=storage,
        checkpoints="c",
        checkpoint_steps=100,
        history=HistoryWriter(),
        token_counts=TokenCounts(),
    )
    trainer.fit(context)
    [name] = [name for name in storage.names("c") if "history" in name]
    rows = tables.read(storage, name).to_pylist()
    assert [row["learning_rate"] for row in rows] == [learning_rate(train, step, 5) for step in range(1, 6)]
    assert all(row["gradient_norm"] > 0.05 for row in rows)
