"""Products in bfloat16 over float32 weights: what keeps its precision, and how near the numbers stay."""

from dataclasses import replace

import pytest
import torch

from demo import families
from masters.config import Rewards, Train
from masters.models.distributed import mixed_precision
from masters.models.training import trainer
from masters.models.training.groups import Step
from tests.models import tiny_models
from tests.models.tiny_jobs import gradient, make_job, references

EVERYTHING = Step(0, 0, tuple(range(8)))
MIXED = Train(compute_dtype="bfloat16")


def stepped(name: str, train: Train) -> tuple[trainer.TrainContext, dict[str, float]]:
    """A step's gradients in the student, and its sums. Answers alone are rewarded: min-max stretches any rounding."""
    student = mixed_precision.apply_autocast(tiny_models.model(name, 0), train)
    teacher = tiny_models.model(name, 1, 0.2).to(getattr(torch, mixed_precision.frozen_dtype(train)))
    plain = make_job(name)
    job = replace(plain, student=student, teacher=teacher, train=train, rewards=Rewards(distillation="off"))
    return job, trainer.run_step(job, EVERYTHING, references(plain))


@pytest.mark.parametrize("name", families.NAMES)
def test_a_step_is_that_of_float32_to_bfloat16s_precision(name: str) -> None:
    (plain, sums), (mixed, mixed_sums) = stepped(name, Train()), stepped(name, MIXED)
    expected, found = gradient(plain.student), gradient(mixed.student)
    assert found.dtype == torch.float32
    assert 1e-5 < (found - expected).norm() / expected.norm() < 0.03  # it did compute otherwise, by a few of 2^-8
    assert mixed_sums["loss"] == pytest.approx(sums["loss"], rel=0.02)
    assert mixed_sums["divergence"] == pytest.approx(sums["divergence"], rel=0.02)


def test_a_small_step_is_not_lost() -> None:
    """A change by 1e-6 is less than bfloat16 tells apart at the size of these weights."""
    job, _ = stepped(families.NAMES[0], MIXED)
    parameters = list(job.student.parameters())
    before = [p.detach().clone() for p in parameters]
    torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0).step()
    moved = [(p - b).abs().max() for p, b in zip(parameters, before, strict=True) if p.grad is not None]
    assert all(p.dtype == torch.float32 for p in parameters)
    assert sum(size > 0 for size in moved) > 0.9 * len(moved)
    assert {p.dtype for p in job.teacher.parameters()} == {torch.bfloat16}


def test_without_it_nothing_is_wrapped() -> None:
    model = tiny_models.model(families.NAMES[0], 0)
    assert mixed_precision.apply_autocast(model, Train()) is model and "forward" not in vars(model.model)
    assert mixed_precision.frozen_dtype(Train(dtype="bfloat16")) == "bfloat16"
