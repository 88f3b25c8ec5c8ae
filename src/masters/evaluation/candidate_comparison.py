"""Candidate against champion on the same evaluation questions, for the promotion gate.

Questions about one image are right or wrong together, so the image is the unit of the paired test.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass

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


def _accuracy(correct: Mapping[str, bool], questions: Collection[str]) -> float:
    return sum(correct[question] for question in questions) / len(questions)
