"""The promotion gate's test: candidate against champion on the same evaluation questions.

Questions about one image are right or wrong together, so the image is the unit of the paired test.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass

from masters.config import Nightly
from masters.evaluation.statistics import sign_flip_p_value


@dataclass(frozen=True)
class Category:
    """Accuracies on the n questions of one category, by the configured verifier."""

    n: int
    candidate: float
    champion: float


@dataclass(frozen=True)
class Comparison:
    """Accuracies of both models on the same n questions.

    `gained`: questions that only the candidate answers correctly; `lost`: only the champion. `p_value`: probability of
    this gain or a larger one if both were equally good (exact one-sided sign-flip test over images; McNemar's test if
    each question has its own image).
    """

    n: int
    images: int
    candidate: float
    champion: float
    gained: int
    lost: int
    p_value: float
    categories: dict[str, Category]

    def as_dict(self) -> dict:
        return asdict(self)


def compare(
    candidate: Mapping[str, bool],
    champion: Mapping[str, bool],
    category: Mapping[str, str | None],
    image: Mapping[str, str],
) -> Comparison:
    """Compare two models, given whether each answered each question correctly.

    `category` and `image`: those of each question. All mappings are by question id. Raises ValueError if the models
    answered different questions.
    """
    if not candidate or candidate.keys() != champion.keys():
        raise ValueError(f"expected the same questions, found {len(candidate)} and {len(champion)}")
    gained = sum(correct and not champion[question] for question, correct in candidate.items())
    lost = sum(champion[question] and not correct for question, correct in candidate.items())
    difference_by_image: dict[str, int] = defaultdict(int)
    for question, correct in candidate.items():
        difference_by_image[image[question]] += correct - champion[question]
    by_category: dict[str, list[str]] = defaultdict(list)
    for question in candidate:
        by_category[category[question] or ""].append(question)
    return Comparison(
        n=len(candidate),
        images=len(difference_by_image),
        candidate=_accuracy(candidate, candidate),
        champion=_accuracy(champion, candidate),
        gained=gained,
        lost=lost,
        p_value=sign_flip_p_value(difference_by_image.values()),
        categories={
            name: Category(len(questions), _accuracy(candidate, questions), _accuracy(champion, questions))
            for name, questions in sorted(by_category.items())
        },
    )


def regressions(comparison: Comparison, limits: Nightly) -> list[str]:
    """Reasons for which the candidate is worse: overall, or in a category by more than `max_category_drop`."""
    reasons = []
    if comparison.lost > comparison.gained:
        reasons.append(f"worse than the champion: {comparison.candidate:.2%} against {comparison.champion:.2%}")
    for name, category in comparison.categories.items():
        # in questions, not in shares: a drop of exactly the limit is allowed despite rounding
        if category.n * (category.champion - category.candidate) > limits.max_category_drop * category.n + 1e-9:
            drop = f"from {category.champion:.2%} to {category.candidate:.2%}"
            reasons.append(f"category {name or '(none)'} falls {drop}")
    return reasons


def objections(comparison: Comparison, limits: Nightly) -> list[str]:
    """Reasons for which the candidate does not become champion; empty if it does."""
    reasons = regressions(comparison, limits)
    if comparison.lost <= comparison.gained and comparison.p_value >= limits.p_value:
        reasons.append(
            f"not proven better: {comparison.gained} questions gained, {comparison.lost} lost, "
            f"p = {comparison.p_value:.3f}, expected below {limits.p_value}"
        )
    return reasons


def _accuracy(correct: Mapping[str, bool], questions: Collection[str]) -> float:
    return sum(correct[question] for question in questions) / len(questions)
