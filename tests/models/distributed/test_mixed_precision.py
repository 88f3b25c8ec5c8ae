"""Matrix products in bfloat16 with float32 weights: what stays in float32, and how close results are."""

from dataclasses import replace

import pytest
import torch

from demo import families
from masters.config import Train
from masters.models.distributed import mixed_precision
from masters.models.training import trainer
from masters.models.training.groups import Step
from tests.models import tiny_models
from tests.models.paper import paper_rewards, paper_train
from tests.models.tiny_contexts import gradient, make_context, references

EVERYTHING = Step(0, 0, tuple(range(8)))
MIXED = paper_train(compute_dtype="bfloat16")


def run_step(name: str, train: Train) -> tuple[trainer.TrainContext, dict[str, float]]:
    """Run one step. Returns the context with gradients, and the sums.

    Without distillation rewards, since min-max amplifies rounding.
    """
    student = mixed_precision.apply_autocast(tiny_models.model(name, 0), train)
    teacher = tiny_models.model(name, 1, 0.2).to(getattr(torch, mixed_precision.frozen_dtype(train)))
    plain = make_context(name)
    context = replace(plain, student=student, teacher=teacher, train=train, rewards=paper_rewards(distillation="off"))
    return context, trainer.run_step(context, EVERYTHING, references(plain))


@pytest.mark.parametrize("name", families.NAMES)
def test_a_step_equals_float32_up_to_bfloat16_precision(name: str) -> None:
    (plain, sums), (mixed, mixed_sums) = run_step(name, paper_train()), run_step(name, MIXED)
    expected, found = gradient(plain.student), gradient(mixed.student)
    assert found.dtype == torch.float32
    assert 1e-5 < (found - expected).norm() / expected.norm() < 0.03  # different, by a few times 2^-8
    assert mixed_sums["loss"] == pytest.approx(sums["loss"], rel=0.02)
    assert mixed_sums["divergence"] == pytest.approx(sums["divergence"], rel=0.02)


def test_a_small_update_is_not_lost_to_rounding() -> None:
    """An update of 1e-6 is below bfloat16's resolution at the magnitude of these weights."""
    context, _ = run_step(families.NAMES[0], MIXED)
    parameters = list(context.student.parameters())
    before = [p.detach().clone() for p in parameters]
    torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0).step()
    moved = [(p - b).abs().max() for p, b in zip(parameters, before, strict=True) if p.grad is not None]
    assert all(p.dtype == torch.float32 for p in parameters)
    assert sum(size > 0 for size in moved) > 0.9 * len(moved)
    assert {p.dtype for p in context.teacher.parameters()} == {torch.bfloat16}


def test_float32_models_are_not_wrapped() -> None:
    model = tiny_models.model(families.NAMES[0], 0)
    assert mixed_precision.apply_autocast(model, paper_train()) is model and "forward" not in vars(model.model)
    assert mixed_precision.frozen_dtype(paper_train(dtype="bfloat16")) == "bfloat16"
