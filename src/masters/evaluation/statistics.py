"""Statistics of answers that are not independent: questions about one image tend to be right or wrong together."""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

import numpy as np


def clustered_standard_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Return the standard error of the mean of n values, where values of one cluster may depend on each other.

    sqrt(G / (G - 1) sum_g (sum_{i in g} (x_i - mean))^2) / n over the G clusters (the cluster-robust estimator). If
    each value is its own cluster, it is the usual sd / sqrt(n). A single cluster shows no variation and gives 0.
    """
    mean, residuals = sum(values) / len(values), defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        residuals[cluster] += value - mean
    count = len(residuals)
    if count < 2:
        return 0.0
    return math.sqrt(count / (count - 1) * sum(total**2 for total in residuals.values())) / len(values)


def sign_flip_p_value(differences: Iterable[int]) -> float:
    """Return the p-value of the exact one-sided sign-flip test on one difference per cluster.

    It is the probability of a sum at least as large as the observed one if each difference had either sign with
    probability 1/2; the distribution of the sum is convolved difference by difference. With differences of -1, 0 and 1
    it is the exact one-sided McNemar test.
    """
    nonzero = [difference for difference in differences if difference]
    max_sum = sum(map(abs, nonzero))
    probability = np.zeros(2 * max_sum + 1)  # of the sums -max_sum to max_sum
    probability[max_sum] = 1.0
    for size in map(abs, nonzero):
        probability = 0.5 * (np.roll(probability, size) + np.roll(probability, -size))  # no sum exceeds max_sum
    return float(probability[max_sum + sum(nonzero) :].sum())
