"""What a training step adds up over its passes and ranks, and the means that are reported of it.

Every name is a sum that a pass knows its part of, so that passes and ranks only have to be added: a mean over anything
but questions is the quotient of two such sums. Names of `LARGEST` are maxima instead.
"""

from collections.abc import Iterable, Mapping

LARGEST = {"largest_token_kl"}
# what the sum of a name is divided by, where that is not the step's questions; named in `diagnostics`
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


def merged(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sums, or maxima, of several passes or ranks, by name; a part may lack names."""
    found: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            known = found.get(name)
            if known is None:
                found[name] = value
            else:
                found[name] = max(known, value) if name in LARGEST else known + value
    return found


def means(sums: Mapping[str, float], questions: int) -> dict[str, float]:
    """What is reported of a step: means over what each name is counted in. A mean over nothing is left out."""
    found = {}
    for name, value in sums.items():
        if name in LARGEST:
            found[name] = value
        elif name not in DENOMINATORS.values():
            count = sums[DENOMINATORS[name]] if name in DENOMINATORS else questions
            found |= {name: value / count} if count else {}
    return found
