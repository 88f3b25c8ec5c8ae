"""The mask-progressive schedule (Eq. 3), and the assignment of questions to mask stages. Imports no torch."""

from masters.common.hashing import to_unit_interval

DECIMALS = 6  # mask ratios are dictionary keys, so they are rounded wherever they are written
TOLERANCE = 1e-6  # allowed distance of r_max / step from a whole number: 3 * 0.05 is not 0.15 in floats


def mask_ratio(iteration: int, iterations: int, r_max: float, step: float) -> float:
    """Return r[i] = r_max - s floor(i M / I), M = r_max / s + 1, for i in 1..I (Eq. 3), clamped at 0.

    Ours: the clamp. Read literally, i = I would give a stage beyond the last one.

    Raises ValueError if the iteration is outside 1..I or r_max is not a multiple of the step.
    """
    if not 1 <= iteration <= iterations:
        raise ValueError(f"iteration must lie in 1..{iterations}, found {iteration}")
    ratios = mask_ratios(r_max, step)
    return ratios[min(iteration * len(ratios) // iterations, len(ratios) - 1)]


def mask_ratios(r_max: float, step: float) -> list[float]:
    """Return the ratios r_max, r_max - s, ..., 0 of the M = r_max / s + 1 mask stages (Eq. 3).

    Ours: the ratios are rounded to 6 decimals. Raises ValueError if r_max is not a multiple of s.
    """
    if not (0 <= r_max <= 1 and 0 < step <= 1):
        raise ValueError(f"expected 0 <= r_max <= 1 and 0 < step <= 1, found r_max = {r_max}, step = {step}")
    count = round(r_max / step)
    if abs(r_max / step - count) > TOLERANCE:
        raise ValueError(f"r_max ({r_max}) must be a multiple of step ({step})")
    return [round(step * k, DECIMALS) for k in range(count, -1, -1)]


def mask_stage_of(question_digest: str, stages: int) -> int:
    """Return the mask stage floor(u M) of a question, where u in [0, 1) is derived from the question's digest.

    Ours: assigning by content lets the data grow without moving any question to another stage. With many questions
    the stages have equal shares, as in Eq. 3.
    """
    return int(to_unit_interval(question_digest) * stages)
