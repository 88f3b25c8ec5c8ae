"""The mask-progressive schedule (Eq. 3) and which stage a question belongs to. Imports no torch."""

from masters.common.hashing import to_unit_interval

DECIMALS = 6  # ratios are keys: rounded wherever they are written
TOLERANCE = 1e-6  # of r_max / step from a whole number, as in the configuration: 3 * 0.05 is not 0.15 in floats


def mask_ratio(iteration: int, iterations: int, r_max: float, step: float) -> float:
    """r[i] = r_max - s floor(i M / I), M = r_max / s + 1, for i in 1..I (Eq. 3), clamped at 0.

    Read literally, i = I gives a stage beyond the last; the clamp (ours) keeps it in the last one.

    Raises ValueError if the iteration is outside 1..I or r_max is no multiple of the step.
    """
    if not 1 <= iteration <= iterations:
        raise ValueError(f"iteration must lie in 1..{iterations}, found {iteration}")
    stages = mask_ratios(r_max, step)
    return stages[min(iteration * len(stages) // iterations, len(stages) - 1)]


def mask_ratios(r_max: float, step: float) -> list[float]:
    """The M = round(r_max / s) + 1 ratios r_max, r_max - s, ..., 0 (Eq. 3).

    Ours: they are rounded to 6 decimals. Raises ValueError if r_max is no multiple of s.
    """
    if not (0 <= r_max <= 1 and 0 < step <= 1):
        raise ValueError(f"expected 0 <= r_max <= 1 and 0 < step <= 1, found r_max = {r_max}, step = {step}")
    count = round(r_max / step)
    if abs(r_max / step - count) > TOLERANCE:
        raise ValueError(f"r_max ({r_max}) must be a multiple of step ({step})")
    return [round(step * k, DECIMALS) for k in range(count, -1, -1)]


def mask_stage_of(question_digest: str, stages: int) -> int:
    """floor(u M), u in [0, 1) from the question's content. Ours, so that data can grow without moving any question.

    With many questions the stages are equal shares, as in Eq. 3.
    """
    return int(to_unit_interval(question_digest) * stages)
