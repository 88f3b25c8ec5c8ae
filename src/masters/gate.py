"""Whether tonight's student takes the champion's place: a paired test on the same evaluation questions."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from scipy.stats import binomtest

from masters.config import Nightly


@dataclass(frozen=True)
class Category:
    """Exact-match accuracies on the questions of one category."""

    n: int
    candidate: float
    champion: float


@dataclass(frozen=True)
class Comparison:
    """Both models on the same n questions. `gained`: questions that only the candidate has right; `lost`: only the
    champion. `p_value`: of so many gains or more if both were equally good (exact one-sided McNemar test).
    """

    n: int
    candidate: float
    champion: float
    gained: int
    lost: int
    p_value: float
    categories: dict[str, Category]

    def as_dict(self) -> dict:
        return asdict(self)


def compare(
    candidate: Mapping[str, bool], champion: Mapping[str, bool], category: Mapping[str, str | None]
) -> Comparison:
    """`candidate` and `champion` say of every question whether it was right. Raises ValueError if they differ."""
    if not candidate or candidate.keys() != champion.keys():
        raise ValueError(f"expected the same questions, found {len(candidate)} and {len(champion)}")
    gained = sum(right and not champion[question] for question, right in candidate.items())
    lost = sum(champion[question] and not right for question, right in candidate.items())
    p_value = float(binomtest(gained, gained + lost, alternative="greater").pvalue) if gained + lost else 1.0
    asked: dict[str, list[str]] = {}
    for question in candidate:
        asked.setdefault(category[question] or "", []).append(question)
    return Comparison(
        len(candidate), _share(candidate, candidate), _share(champion, candidate), gained, lost, p_value,
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
