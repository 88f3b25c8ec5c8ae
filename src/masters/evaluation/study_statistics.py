"""Paired comparisons of two arms of a study, whose students all answered the same questions.

Shapes: S seeds, Q questions. Two things vary by chance: the training (the seed) and the images that are asked about.
The sign-flip test over images averages over the seeds and treats these as fixed: it says whether the difference would
hold on other images. The t test over seeds treats the questions and the generated responses as fixed: it says whether
the difference would hold in another training on the same responses. Ours: the p-value of a comparison is the larger of
the two, so that a difference counts only where both kinds of chance are ruled out (an intersection-union test, which
needs no model of how they combine).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats

from masters.common.errors import MastersError
from masters.evaluation.statistics import clustered_standard_error, sign_flip_p_value

Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """Accuracy of one arm minus that of another, as the mean over seeds and questions, with both tests' results.

    `image_interval`: clustered by image, seeds fixed; `seed_interval`: t over seeds, questions fixed; both at `level`.
    `p_value`: the larger of `image_p_value` and `seed_p_value`, all two-sided.
    """

    seeds: int
    questions: int
    images: int
    difference: float
    level: float
    image_interval: Interval
    image_p_value: float
    seed_interval: Interval
    seed_p_value: float
    p_value: float

    def as_dict(self) -> dict:
        return asdict(self)


def difference(better_SQ: np.ndarray, than_SQ: np.ndarray, image_Q: Sequence[int], level: float = 0.95) -> Difference:
    """Compare two arms. `better_SQ`, `than_SQ`: whether the student of a seed has a question right, seeds in one order.

    Raises MastersError with fewer than two seeds or two images, which show no variation.
    """
    images = len(set(image_Q))
    if len(better_SQ) < 2 or images < 2:
        raise MastersError(f"a comparison needs 2 seeds and 2 images or more, found {len(better_SQ)} and {images}")
    gained_SQ = better_SQ.astype(int) - than_SQ.astype(int)
    mean_Q, mean_S = gained_SQ.mean(0), gained_SQ.mean(1)
    mean = float(gained_SQ.mean())
    image_error = clustered_standard_error(mean_Q.tolist(), image_Q)
    seed_error = float(mean_S.std(ddof=1)) / math.sqrt(len(mean_S))
    by_image, by_seed = _image_p_value(gained_SQ, image_Q), _t_p_value(mean, seed_error, len(mean_S) - 1)
    return Difference(
        seeds=len(mean_S), questions=len(mean_Q), images=images, difference=mean, level=level,
        image_interval=interval(mean, image_error, images - 1, level), image_p_value=by_image,
        seed_interval=interval(mean, seed_error, len(mean_S) - 1, level), seed_p_value=by_seed,
        p_value=max(by_image, by_seed),
    )  # fmt: skip


def interval(mean: float, error: float, freedom: int, level: float = 0.95) -> Interval:
    """The t interval of a mean from its standard error and degrees of freedom."""
    reach = float(stats.t.ppf((1 + level) / 2, freedom)) * error
    return mean - reach, mean + reach


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method, in the given order.

    Rejecting those up to alpha keeps the chance of any false rejection at alpha, however the tests depend on each
    other.
    """
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[at]))
        corrected[at] = highest
    return corrected


def _image_p_value(gained_SQ: np.ndarray, image_Q: Sequence[int]) -> float:
    """Exact two-sided sign-flip test over images, of the questions' sums over seeds (their means, times S)."""
    _, cluster_Q = np.unique(np.asarray(image_Q), return_inverse=True)
    by_image = np.bincount(cluster_Q, weights=gained_SQ.sum(0)).round().astype(int)
    sign = 1 if by_image.sum() >= 0 else -1
    # all signs together are symmetric about 0: both tails are twice the one
    return min(1.0, 2 * sign_flip_p_value((sign * by_image).tolist()))


def _t_p_value(mean: float, error: float, freedom: int) -> float:
    if error == 0:
        return 0.0 if mean else 1.0
    return 2 * float(stats.t.sf(abs(mean / error), freedom))
