"""Negative controls train with values that are independent of the responses and equal in every epoch."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from masters.config import Train
from masters.data.question_shards import QuestionRef
from masters.models.families import FAMILIES
from masters.models.training import negative_controls, trainer
from masters.models.training.groups import Group
from tests.models.paper import paper_rewards, paper_train
from tests.models.tiny_contexts import make_context, packed, references

SCORES = np.array([1.0, 1.0, 0.0, np.nan, 0.25, 0.0])


def group(name: str) -> Group:
    is_trained, keys = np.ones(len(SCORES), bool), [("teacher", 0.2, 0)] * len(SCORES)
    return Group(QuestionRef("", name, 0, 0), 0, None, [[1]] * len(SCORES), SCORES, is_trained, keys)


def draw_verdicts(control: Any, seed: int = 0, questions: int = 300) -> np.ndarray:
    train = paper_train(control=control, seed=seed)
    return np.stack([negative_controls.verdicts(group(f"q{number}"), train) for number in range(questions)])


def test_without_a_control_verdicts_are_unchanged() -> None:
    np.testing.assert_array_equal(draw_verdicts("none"), np.tile(SCORES, (300, 1)))


def test_shuffled_verdicts_are_uniform_permutations_of_the_groups_own() -> None:
    shuffled = draw_verdicts("shuffled_verdicts")
    np.testing.assert_array_equal(np.sort(shuffled), np.tile(np.sort(SCORES), (300, 1)))
    for column in shuffled.T:  # each response gets each verdict as often
        assert np.nanmean(column) == pytest.approx(np.nanmean(SCORES), abs=0.1)
        assert np.isnan(column).mean() == pytest.approx(1 / 6, abs=0.07)


def test_random_advantages_are_standard_normal_and_independent_of_verdicts() -> None:
    noise = draw_verdicts("random_advantages")
    assert noise.mean() == pytest.approx(0, abs=0.1) and noise.std() == pytest.approx(1, abs=0.1)
    assert all(abs(column.mean()) < 0.25 for column in noise.T)


@pytest.mark.parametrize("control", ["shuffled_verdicts", "random_advantages"])
def test_a_control_depends_on_seed_and_question_only(control: str) -> None:
    np.testing.assert_array_equal(draw_verdicts(control), draw_verdicts(control))
    assert not np.array_equal(draw_verdicts(control, seed=1), draw_verdicts(control), equal_nan=True)


@pytest.mark.parametrize("control", ["shuffled_verdicts", "random_advantages"])
def test_a_batch_is_trained_with_the_values_of_the_control(control: Any) -> None:
    context, everything = make_context(next(iter(FAMILIES))), list(range(8))
    controlled = replace(context, train=paper_train(control=control), rewards=paper_rewards())
    outcome = trainer.batch_outcome(controlled, packed(context, everything), everything, references(context))
    found = torch.tensor(outcome.responses["reward_accuracy"], dtype=torch.float64)
    expected = np.concatenate([negative_controls.verdicts(one, controlled.train) for one in context.groups])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    if control == "random_advantages":
        begin = 0
        for one in context.groups:  # normalized noise, nothing of the divergence
            noise = expected[begin : begin + len(one.scores)]
            advantage = outcome.responses["advantage"][begin : begin + len(noise)]
            normal = (noise - noise.mean()) / noise.std() if len(noise) > 1 else np.zeros(1)
            np.testing.assert_allclose(advantage, normal, atol=1e-5)
            begin += len(noise)


def test_fine_tuning_on_responses_uses_right_ones_only_and_on_labels_all() -> None:
    context, everything = make_context(next(iter(FAMILIES))), list(range(8))
    losses = []
    for targets in ("responses", "labels"):
        one = replace(context, teacher=None, train=Train.model_validate(dict(objective="sft", targets=targets)))
        losses.append(trainer.batch_outcome(one, packed(context, everything), everything, {}).loss.item())
    assert 0 < losses[0] < losses[1]  # q4 has no verdict, others have wrong responses
