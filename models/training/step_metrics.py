"""Sums that a training step collects over its passes and ranks, and the means that are reported.

Each pass contributes to every sum, so the sums of passes and ranks are only added. A mean over anything but questions
is the quotient of two sums. Names in `LARGEST` are maxima instead of sums.
"""

from collections.abc import Iterable, Mapping

LARGEST = {"largest_token_kl"}
# the sum that a sum is divided by, if not by the number of the step's questions; `diagnostics` computes both
DENOMINATORS = {
    "entropy": "tokens",
    "rare_negatives": "tokens",
    "rare_negatives_gradient": "squared_reward_gradient",
    "log_pi_right_teacher": "tokens_right_teacher",
    "log_pi_right_student": "tokens_right_student",
    "log_pi_wrong_teacher": "tokens_wrong_teacher",
    "log_pi_wrong_student": "tokens_wrong_student",
    "greedy_end": "ended_responses",
    "distillation_agreement": "pairs_distillation",
    "reward_agreement": "pairs_reward",
}


def merge(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Add the sums, and take the maxima, of several passes or ranks, by name. A part may lack names."""
    merged: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            if name not in merged:
                merged[name] = value
            else:
                merged[name] = max(merged[name], value) if name in LARGEST else merged[name] + value
    return merged


def means(sums: Mapping[str, float], questions: int) -> dict[str, float]:
    """Divide each sum by its denominator. A mean over nothing is left out."""
    found = {}
    for name, value in sums.items():
        if name in LARGEST:
            found[name] = value
        elif name not in DENOMINATORS.values():
            count = sums[DENOMINATORS[name]] if name in DENOMINATORS else questions
            found |= {name: value / count} if count else {}
    return found
