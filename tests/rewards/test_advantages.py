"""Advantages against Eq. 8 in NumPy. Shapes: G responses to one question."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from masters.rewards.advantages import group_advantages
from tests.models import float64_reference

reward = st.one_of(st.floats(0, 2), st.just(math.nan))
groups = st.lists(reward, min_size=1, max_size=16).map(np.array)


def is_near_noise_floor(reward_G: np.ndarray) -> bool:
    """Return whether rounding decides on which side of the noise floor the deviation lies."""
    valid = reward_G[~np.isnan(reward_G)]
    return len(valid) > 0 and abs(valid.std() - 1e-4) < 1e-9


@given(groups)
def test_advantages_are_standardized_within_the_group(reward_G: np.ndarray) -> None:
    assume(not is_near_noise_floor(reward_G))
    found = group_advantages(reward_G).numpy()
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, float64_reference.advantage(reward_G), rtol=1e-6, atol=1e-9)


@given(groups, st.floats(-3, 3))
def test_adding_a_constant_to_all_rewards_changes_nothing(reward_G: np.ndarray, shift: float) -> None:
    assume(not is_near_noise_floor(reward_G))
    found = group_advantages(reward_G + shift).numpy()
    np.testing.assert_allclose(found, group_advantages(reward_G).numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_example_with_the_population_deviation(kind) -> None:
    found = group_advantages(kind([0.0, 2.0, math.nan, 0.0, 2.0]))
    assert found.tolist() == [-1.0, 1.0, 0.0, -1.0, 1.0]


@pytest.mark.parametrize(
    "rewards",
    [
        [1.0] * 8,
        [1],
        [0, 0],
        [math.nan],
        [math.nan, math.nan],
        [1.0, math.nan],
        [0.5, 0.5 + 1e-4],
        [0.1 + 0.2, 0.3, 0.3],
    ],
)
def test_degenerate_groups_are_zero(rewards: list[float]) -> None:
    assert group_advantages(rewards).tolist() == [0.0] * len(rewards)


def test_a_deviation_just_above_the_noise_gives_advantages() -> None:
    assert group_advantages(np.array([0.0, 2.2e-4])).tolist() == [-1.0, 1.0]


def test_results_have_no_gradient_and_inputs_are_unchanged() -> None:
    reward_G = torch.tensor([0.0, 1.0, math.nan], requires_grad=True)
    assert not group_advantages(reward_G).requires_grad
    assert reward_G.detach().nan_to_num(7.0).tolist() == [0.0, 1.0, 7.0]
