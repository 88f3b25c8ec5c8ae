"""Paired comparisons of two arms of a study, whose students all answered the same questions.

Shapes: S seeds, Q questions.

Two things vary by chance: the training (the seed) and the images of the questions. The sign-flip test over images
averages over the seeds and treats them as fixed: it says whether the difference would hold on other images. The t test
over seeds treats the questions and the generated responses as fixed: it says whether the difference would hold in
another training on the same responses. Ours: the p-value of a comparison is the larger of the two, so that a
difference counts only if both kinds of chance are ruled out (an intersection-union test, which needs no model of how
they combine).
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
    """Difference of two arms' accuracies, the mean over seeds and questions, with the results of both tests.

    `image_interval`: clustered by image, seeds fixed; `seed_interval`: t over seeds, questions fixed; both at `level`.
    `p_value`: the larger of `image_p_value` and `seed_p_value`; all are two-sided.
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


def difference(
    better_SQ: np.ndarray, baseline_SQ: np.ndarray, image_Q: Sequence[int], level: float = 0.95
) -> Difference:
    """Compare two arms: accuracy of `better` minus accuracy of `baseline`.

    `better_SQ`, `baseline_SQ`: whether the student of each seed answers each question correctly, seeds in the same
    order. Raises MastersError with fewer than two seeds or two images, which show no variation.
    """
    images = len(set(image_Q))
    if len(better_SQ) < 2 or images < 2:
        raise MastersError(f"a comparison needs 2 seeds and 2 images or more, found {len(better_SQ)} and {images}")
    gain_SQ = better_SQ.astype(int) - baseline_SQ.astype(int)
    gain_Q, gain_S = gain_SQ.mean(0), gain_SQ.mean(1)
    gain = float(gain_SQ.mean())
    image_error = clustered_standard_error(gain_Q.tolist(), image_Q)
    seed_error = float(gain_S.std(ddof=1)) / math.sqrt(len(gain_S))
    image_p_value, seed_p_value = _image_p_value(gain_SQ, image_Q), _t_p_value(gain, seed_error, len(gain_S) - 1)
    return Difference(
        seeds=len(gain_S),
        questions=len(gain_Q),
        images=images,
        difference=gain,
        level=level,
        image_interval=interval(gain, image_error, images - 1, level),
        image_p_value=image_p_value,
        seed_interval=interval(gain, seed_error, len(gain_S) - 1, level),
        seed_p_value=seed_p_value,
        p_value=max(image_p_value, seed_p_value),
    )


def interval(mean: float, error: float, degrees_of_freedom: int, level: float = 0.95) -> Interval:
    """Return the t interval of a mean with this standard error."""
    margin = float(stats.t.ppf((1 + level) / 2, degrees_of_freedom)) * error
    return mean - margin, mean + margin


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for multiple comparisons by Holm's step-down method, in the given order.

    If hypotheses with corrected p-values up to alpha are rejected, the probability of any false rejection is at most
    alpha, however the tests depend on each other.
    """
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def _image_p_value(gain_SQ: np.ndarray, image_Q: Sequence[int]) -> float:
    """Return the p-value of the exact two-sided sign-flip test over images, on the questions' sums over seeds."""
    _, cluster_Q = np.unique(np.asarray(image_Q), return_inverse=True)
    by_image = np.bincount(cluster_Q, weights=gain_SQ.sum(0)).round().astype(int)
    sign = 1 if by_image.sum() >= 0 else -1
    # the distribution over all signs is symmetric about 0, so both tails are twice one tail
    return min(1.0, 2 * sign_flip_p_value((sign * by_image).tolist()))


def _t_p_value(mean: float, error: float, degrees_of_freedom: int) -> float:
    if error == 0:
        return 0.0 if mean else 1.0
    return 2 * float(stats.t.sf(abs(mean / error), degrees_of_freedom))
