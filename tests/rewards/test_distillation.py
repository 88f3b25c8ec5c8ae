"""R_distill against Eq. 6-7 in NumPy. Shapes: G responses to one question."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from masters.rewards.distillation import distillation_rewards, raw_distillation_rewards
from tests.models import float64_reference

groups = st.lists(st.floats(0, math.log(2)), min_size=1, max_size=16)


@given(groups)
def test_reverse_min_max(divergence: list[float]) -> None:
    d_G = np.array(divergence)
    found = distillation_rewards(d_G).numpy()
    np.testing.assert_allclose(found, float64_reference.distillation_reward(d_G, np.ones(len(d_G), bool)), atol=1e-12)
    if found.any():
        assert found[d_G.argmin()] == 1
        assert found[d_G.argmax()] == 0


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_example_with_lists_arrays_and_tensors(kind) -> None:
    found = distillation_rewards(kind([0.1, 0.3, 0.2, 0.5]))
    assert isinstance(found, torch.Tensor)
    np.testing.assert_allclose(found.numpy(), [1.0, 0.5, 0.75, 0.0], rtol=1e-6)


@pytest.mark.parametrize("spread", [0.0, 1e-6, 9.9e-6])
def test_rounding_noise_is_no_reward(spread: float) -> None:
    assert distillation_rewards([0.2, 0.2 + spread, 0.2]).tolist() == [0.0, 0.0, 0.0]


def test_a_spread_just_above_the_noise_is_rewarded() -> None:
    assert distillation_rewards(np.array([0.0, 1.1e-5])).tolist() == [1.0, 0.0]


def test_a_response_without_a_verdict_does_not_count() -> None:
    valid_G = [True, False, True, True, False]
    found = distillation_rewards(np.array([0.2, 0.0, 0.4, 0.3, 0.9]), valid_G)
    np.testing.assert_allclose(found.numpy(), [1.0, 0.0, 0.0, 0.5, 0.0])
    assert distillation_rewards([0.1, 0.2], [False, False]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_divergence_that_is_not_finite_does_not_count(bad: float) -> None:
    found = distillation_rewards(np.array([0.2, bad, 0.4, 0.3]))
    np.testing.assert_allclose(found.numpy(), [1.0, 0.0, 0.0, 0.5])
    assert raw_distillation_rewards(np.array([0.25, bad])).tolist() == [-0.25, 0.0]
    assert distillation_rewards([bad, bad]).tolist() == [0.0, 0.0]


def test_identical_responses_share_their_mean() -> None:
    d_G, sequence_id_G = np.array([0.1, 0.5, 0.2, 0.6]), [0, 1, 0, 2]
    found = distillation_rewards(d_G, sequence_id_G=sequence_id_G).numpy()
    everyone = np.ones(4, bool)
    d_G = float64_reference.share_divergence(d_G, [(0,), (1,), (0,), (2,)], everyone)
    np.testing.assert_allclose(d_G, [0.15, 0.5, 0.15, 0.6])
    np.testing.assert_allclose(found, float64_reference.distillation_reward(d_G, everyone))
    assert not distillation_rewards(d_G, sequence_id_G=[0, 0, 0, 0]).any()


def test_only_responses_that_count_share_a_mean() -> None:
    found = distillation_rewards(np.array([0.1, math.nan, 0.3, 0.5]), sequence_id_G=[0, 0, 1, 2])
    np.testing.assert_allclose(found.numpy(), [1.0, 0.0, 0.5, 0.0])


def test_raw_is_the_negative_divergence() -> None:
    found = raw_distillation_rewards(np.array([0.1, 0.5, 0.3]), [True, True, False], [0, 0, 1])
    np.testing.assert_allclose(found.numpy(), [-0.3, -0.3, 0.0])


@pytest.mark.parametrize("rewards", [distillation_rewards, raw_distillation_rewards])
def test_results_have_no_gradient_and_inputs_are_unchanged(rewards) -> None:
    d_G = torch.tensor([0.1, 0.5, 0.3], requires_grad=True)
    assert not rewards(d_G, sequence_id_G=[0, 0, 1]).requires_grad
    assert torch.equal(d_G.detach(), torch.tensor([0.1, 0.5, 0.3]))
