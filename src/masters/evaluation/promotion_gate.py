"""Whether tonight's student takes the champion's place: a paired test on the same evaluation questions.

Questions about one image are right or wrong together, so that the image is the unit of the test.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from masters.config import Nightly
from masters.evaluation.statistics import sign_flip_p_value


@dataclass(frozen=True)
class Category:
    """Accuracies, by the configuration's verifier, on the questions of one category."""

    n: int
    candidate: float
    champion: float


@dataclass(frozen=True)
class Comparison:
    """Both models on the same n questions. `gained`: questions that only the candidate has right; `lost`: only the
    champion. `p_value`: of such a gain or a larger one if both were equally good (exact one-sided sign-flip test over
    images; McNemar's test where each question has an image of its own).
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
    """`candidate` and `champion` say of every question whether it was right, `category` and `image` what it is about.

    Raises ValueError if the two were asked different questions.
    """
    if not candidate or candidate.keys() != champion.keys():
        raise ValueError(f"expected the same questions, found {len(candidate)} and {len(champion)}")
    gained = sum(right and not champion[question] for question, right in candidate.items())
    lost = sum(champion[question] and not right for question, right in candidate.items())
    by_image: dict[str, int] = defaultdict(int)
    for question, right in candidate.items():
        by_image[image[question]] += right - champion[question]
    asked: dict[str, list[str]] = {}
    for question in candidate:
        asked.setdefault(category[question] or "", []).append(question)
    return Comparison(
        len(candidate), len(by_image), _share(candidate, candidate), _share(champion, candidate), gained, lost,
        sign_flip_p_value(by_image.values()),
        {name: Category(len(q), _share(candidate, q), _share(champion, q)) for name, q in sorted(asked.items())},
    )  # fmt: skip


def regressions(found: Comparison, limits: Nightly) -> list[str]:
    """What got worse: the whole, or a category by more than `max_category_drop`."""
    reasons = []
    if found.lost > found.gained:
        reasons.append(f"worse than the champion: {found.candidate:.2%} against {found.champion:.2%}")
    for name, one in found.categories.items():
        # in questions, not in shares: a fall of exactly the limit is allowed whatever floats make of it
        if one.n * (one.champion - one.candidate) > limits.max_category_drop * one.n + 1e-9:
            reasons.append(f"category {name or '(none)'} falls from {one.champion:.2%} to {one.candidate:.2%}")
    return reasons


def objections(found: Comparison, limits: Nightly) -> list[str]:
    """Why the candidate does not become champion; empty if it does."""
    reasons = regressions(found, limits)
    if found.lost <= found.gained and found.p_value >= limits.p_value:
        reasons.append(
            f"not proven better: {found.gained} questions gained, {found.lost} lost, p = {found.p_value:.3f}, "
            f"expected below {limits.p_value}"
        )
    return reasons


def _share(right: Mapping[str, bool], questions) -> float:
    return sum(right[question] for question in questions) / len(questions)
