"""The promotion gate: candidate against champion on the same questions."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masters.config import Nightly
from masters.evaluation.candidate_comparison import compare
from masters.evaluation.promotion_decision import objections, regressions

LIMITS = Nightly()


def pairs(both: int, gained: int, lost: int, neither: int = 0) -> tuple[dict[str, bool], dict[str, bool]]:
    """Return whether candidate and champion answer each question correctly, by the number of questions of each kind."""
    comparison = [(True, True)] * both + [(True, False)] * gained + [(False, True)] * lost + [(False, False)] * neither
    return ({f"q{n}": c for n, (c, _) in enumerate(comparison)}, {f"q{n}": c for n, (_, c) in enumerate(comparison)})


def compare_counts(both: int, gained: int, lost: int, neither: int = 0, **category: Any):
    candidate, champion = pairs(both, gained, lost, neither)
    return compare(candidate, champion, {q: category.get(q) for q in candidate}, {q: q for q in candidate})


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30), st.integers(1, 30))
def test_p_value_equals_the_exact_test(both: int, gained: int, lost: int, neither: int) -> None:
    comparison = compare_counts(both, gained, lost, neither)
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(gained, n + 1)) / 2**n
    assert comparison.p_value == pytest.approx(tail)
    assert (comparison.gained, comparison.lost) == (gained, lost)
    assert comparison.candidate - comparison.champion == pytest.approx((gained - lost) / comparison.n)
    assert bool(objections(comparison, LIMITS)) >= bool(regressions(comparison, LIMITS))
    if not objections(comparison, LIMITS):
        assert gained > lost


def test_clearly_better_is_promoted() -> None:
    assert objections(compare_counts(50, 10, 1), LIMITS) == []


def test_ten_questions_about_one_image_prove_no_more_than_one() -> None:
    candidate, champion = pairs(50, 10, 1)
    category, image = dict.fromkeys(candidate), {q: "image" for q in candidate}
    comparison = compare(candidate, champion, category, image)
    assert (comparison.images, comparison.gained, comparison.lost, comparison.p_value) == (1, 10, 1, 0.5)
    assert "not proven better" in objections(comparison, LIMITS)[0]


def test_a_little_better_is_not_proven() -> None:
    (reason,) = objections(compare_counts(50, 2, 1), LIMITS)
    assert "2 questions gained, 1 lost, p = 0.500" in reason
    assert regressions(compare_counts(50, 2, 1), LIMITS) == []


def test_equal_is_not_better() -> None:
    assert objections(compare_counts(5, 0, 0), LIMITS) and not regressions(compare_counts(5, 0, 0), LIMITS)


def test_worse_is_a_regression() -> None:
    assert regressions(compare_counts(50, 1, 10), LIMITS)[0].startswith("worse than the champion")


def test_no_category_may_fall_by_more_than_the_limit() -> None:
    shapes = {f"q{n}": "shape" for n in range(90)} | {f"q{n}": "color" for n in range(90, 140)}
    # 40 shapes right for both, 50 gained; of 50 colors one or two are lost
    one, two = pairs(40, 50, 1, 49), pairs(40, 50, 2, 48)
    images = {question: question for question in shapes}
    assert objections(compare(*one, shapes, images), LIMITS) == []
    (reason,) = objections(compare(*two, shapes, images), LIMITS)
    assert reason == "category color falls from 4.00% to 0.00%"


def test_different_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="the same questions, found 1 and 2"):
        compare({"a": True}, {"a": True, "b": True}, {}, {})
