"""The learning rate of each step against the schedules of transformers, and what must hold of any schedule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from masters.config import Train
from masters.models.training.lr_schedule import learning_rate


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 10), (3, 10), (10, 10), (1, 1), (20, 10)])
def test_rates_equal_those_of_transformers(schedule: str, warmup: int, steps: int) -> None:
    """The warmup of transformers starts with a step at rate 0; ours skips that step."""
    train = Train.model_validate(dict(learning_rate=0.5, schedule=schedule, warmup_steps=warmup))
    name = "constant_with_warmup" if schedule == "constant" else schedule
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=max(steps, warmup + 1))
    rates = []
    for _ in range(steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [rates[step] if step <= warmup else rates[step - 1] for step in range(1, steps + 1)]
    assert [learning_rate(train, step, steps) for step in range(1, steps + 1)] == pytest.approx(expected)


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 30), st.integers(1, 60))
def test_rates_rise_then_fall_and_no_step_is_wasted(schedule: str, warmup: int, steps: int) -> None:
    train = Train.model_validate(dict(learning_rate=1e-3, schedule=schedule, warmup_steps=warmup))
    rates = [learning_rate(train, step, steps) for step in range(1, steps + 1)]
    assert all(0 < rate <= 1e-3 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup]) and rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert warmup >= steps or max(rates) == pytest.approx(1e-3)
