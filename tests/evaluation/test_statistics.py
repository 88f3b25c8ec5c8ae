"""Clustered statistics against brute force and SciPy."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, sem

from masters.evaluation.statistics import clustered_standard_error, sign_flip_p_value

answers = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=40)


@given(st.lists(st.booleans(), min_size=2, max_size=40))
def test_without_clusters_it_is_the_usual_standard_error(right: list[bool]) -> None:
    assert clustered_standard_error(right, range(len(right))) == pytest.approx(sem(np.array(right, float)), abs=1e-12)


@given(answers, st.integers(2, 5))
def test_repeating_questions_keeps_the_standard_error(answered: list[tuple[int, bool]], times: int) -> None:
    clusters, right = zip(*answered, strict=True)
    once = clustered_standard_error(right, clusters)
    assert clustered_standard_error(right * times, clusters * times) == pytest.approx(once, abs=1e-12)


def test_correlated_questions_increase_the_standard_error() -> None:
    right = [True] * 10 + [False] * 10
    together = clustered_standard_error(right, [n // 5 for n in range(20)])
    assert together == pytest.approx(0.5 / np.sqrt(3))  # four images, each all right or all wrong
    assert together > 2 * clustered_standard_error(right, range(20))
    assert clustered_standard_error(right, [0] * 20) == 0.0


@given(st.lists(st.integers(-4, 4), max_size=9))
def test_p_value_equals_enumeration_of_all_signs(differences: list[int]) -> None:
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in product((1, -1), repeat=len(differences))
    ]
    assert sign_flip_p_value(differences) == pytest.approx(np.mean([total >= sum(differences) for total in sums]))


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_single_questions_give_the_exact_mcnemar_test(gained: int, lost: int, equal: int) -> None:
    expected = binomtest(gained, gained + lost, alternative="greater").pvalue if gained + lost else 1.0
    assert sign_flip_p_value([1] * gained + [-1] * lost + [0] * equal) == pytest.approx(expected, rel=1e-9)


@given(st.lists(st.integers(-3, 3), max_size=12), st.integers(2, 5))
def test_repeating_questions_keeps_the_p_value(differences: list[int], times: int) -> None:
    assert sign_flip_p_value([times * d for d in differences]) == pytest.approx(sign_flip_p_value(differences))


def test_thousands_of_questions_are_tested_quickly() -> None:
    assert sign_flip_p_value([3, -2] * 2000) == pytest.approx(0.0, abs=1e-12)
    assert sign_flip_p_value([3, -3] * 2000) == pytest.approx(0.5, abs=0.01)
