"""Comparisons of arms against SciPy and brute force; Holm's correction by its definition."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from masters.common.errors import MastersError
from masters.evaluation.study_statistics import difference, holm, interval

p_values = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def drawn(seeds: int, questions: int, images: int, gain: float, seed: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    than, better = rng.random((seeds, questions)) < 0.6, rng.random((seeds, questions)) < 0.6 + gain
    return better, than, rng.permutation(np.arange(questions) % images).tolist()


@given(st.integers(2, 6), st.integers(0, 1000))
def test_seed_test_equals_scipys_paired_t_test(seeds: int, seed: int) -> None:
    better, than, image_Q = drawn(seeds, 40, 20, 0.1, seed)
    found = difference(better, than, image_Q, level=0.9)
    a, b = better.mean(1), than.mean(1)
    if np.ptp(a - b) < 1e-12:
        return
    expected = stats.ttest_rel(a, b)
    assert found.seed_p_value == pytest.approx(expected.pvalue, abs=1e-9)
    assert found.seed_interval == pytest.approx(tuple(expected.confidence_interval(0.9)), abs=1e-6)
    assert found.difference == pytest.approx((a - b).mean())
    assert found.p_value == max(found.seed_p_value, found.image_p_value)


@given(st.integers(0, 1000), st.sampled_from([-0.3, 0.0, 0.3]))
def test_image_test_equals_enumeration_of_all_signs(seed: int, gain: float) -> None:
    better, than, image_Q = drawn(3, 16, 8, gain, seed)
    mean_Q = better.mean(0) - than.mean(0)
    by_image = np.array([mean_Q[np.array(image_Q) == image].sum() for image in range(8)])
    sums = np.array(list(product((1, -1), repeat=8))) @ by_image
    expected = np.mean(np.abs(sums) >= abs(by_image.sum()) - 1e-9)
    assert difference(better, than, image_Q).image_p_value == pytest.approx(expected)


@given(st.integers(0, 1000))
def test_with_one_image_per_question_the_interval_is_the_usual_one(seed: int) -> None:
    better, than, _ = drawn(4, 30, 30, 0.2, seed)
    mean_Q = better.mean(0) - than.mean(0)
    expected = stats.t.interval(0.95, 29, mean_Q.mean(), stats.sem(mean_Q))
    assert difference(better, than, list(range(30))).image_interval == pytest.approx(expected, abs=1e-6)


def test_repeating_questions_changes_nothing() -> None:
    better, than, image_Q = drawn(3, 24, 12, 0.2, 5)
    once = difference(better, than, image_Q)
    twice = difference(np.tile(better, 2), np.tile(than, 2), image_Q * 2)
    assert twice.image_interval == pytest.approx(once.image_interval)
    assert twice.image_p_value == pytest.approx(once.image_p_value)


def test_swapping_the_arms_mirrors_the_result() -> None:
    better, than, image_Q = drawn(3, 24, 12, 0.2, 6)
    one, other = difference(better, than, image_Q), difference(than, better, image_Q)
    assert other.difference == -one.difference and other.p_value == pytest.approx(one.p_value)
    assert other.seed_interval == pytest.approx((-one.seed_interval[1], -one.seed_interval[0]))


def test_equal_arms_have_no_difference() -> None:
    same, _, image_Q = drawn(3, 24, 12, 0.2, 7)
    found = difference(same, same, image_Q)
    assert (found.difference, found.p_value, found.image_interval, found.seed_interval) == (0, 1, (0, 0), (0, 0))


def test_false_positives_are_rare_without_a_difference() -> None:
    """Seeds and images vary, arms do not: the larger of two p-values errs on the safe side."""
    rng, found = np.random.default_rng(1), []
    for _ in range(200):
        skill, luck = rng.normal(0, 0.2, 60), rng.normal(0, 0.1, (2, 4))
        chance = np.clip(0.5 + skill + luck[:, :, None], 0, 1)
        one, other = rng.random((2, 4, 60)) < chance
        found.append(difference(one, other, [q // 2 for q in range(60)]).p_value < 0.05)
    assert np.mean(found) <= 0.05


@pytest.mark.parametrize(("seeds", "images"), [(1, 4), (3, 1)])
def test_too_few_seeds_or_images_are_refused(seeds: int, images: int) -> None:
    with pytest.raises(MastersError, match="2 seeds and 2 images"):
        difference(*drawn(seeds, 8, images, 0.1, 0))


def test_an_interval_of_one_degree_of_freedom_is_wide() -> None:
    assert interval(1.0, 1.0, 1) == pytest.approx((1 - 12.706, 1 + 12.706), abs=1e-3)


@given(p_values, st.floats(0.001, 0.5))
def test_holm_rejects_what_stepping_down_rejects(given_p: list[float], alpha: float) -> None:
    rejected = set()
    for rank, at in enumerate(sorted(range(len(given_p)), key=given_p.__getitem__)):
        if given_p[at] * (len(given_p) - rank) > alpha:
            break
        rejected.add(at)
    assert {at for at, p in enumerate(holm(given_p)) if p <= alpha} == rejected


@given(p_values)
def test_holm_keeps_the_order_and_lies_between_none_and_bonferroni(given_p: list[float]) -> None:
    corrected = holm(given_p)
    for at, p in enumerate(given_p):
        assert p <= corrected[at] <= min(1.0, len(given_p) * p) + 1e-12
        assert all(corrected[at] <= corrected[other] for other, q in enumerate(given_p) if p < q)


def test_holms_own_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.3]) == [0.3] and holm([]) == []
