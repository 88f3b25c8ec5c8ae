"""Student's t distribution with whole degrees of freedom: SciPy is no runtime dependency."""

import math

WIDEST = 1e9  # |t| up to which quantiles are looked for
HALVINGS = 200


def two_sided_p_value(t: float, freedom: int) -> float:
    """P(|T| >= |t|) by the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    if math.isinf(t):
        return 0.0
    angle = math.atan2(abs(t), math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for power in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    within = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return min(1.0, max(0.0, 1.0 - within))


def two_sided_quantile(level: float, freedom: int) -> float:
    """The t with P(|T| >= t) = 1 - level, by bisection. `level`: e.g. 0.95."""
    low, high = 0.0, WIDEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if two_sided_p_value(middle, freedom) > 1 - level:
            low = middle
        else:
            high = middle
    return high
