"""Diagnostic sums over a pass, computed from the loss terms; `step_metrics` divides them into means.

Ours. Shapes: T response tokens, R responses. All sums are taken on the CPU in float64, after one transfer a pass.
"""

from collections.abc import Collection, Sequence

import torch

from masters.models.losses.formulas import Terms
from masters.models.packing.packed_batch import PackedBatch
from masters.rewards.verdict import RIGHT

RARE = 1e-3  # pi below which a token counts as rare


def token_sums(terms: Terms, packed: PackedBatch, end_tokens: Collection[int]) -> dict[str, float]:
    """Return the student's entropy, summed over tokens, and the number of end tokens that it would choose greedily.

    Only responses that end with one of `end_tokens` count for `greedy_end`, not those cut at the length limit.
    """
    assert terms.entropy_T is not None and terms.greedy_T is not None
    entropy_T, greedy_T = _on_cpu(terms.entropy_T, terms.greedy_T)
    last_R = torch.bincount(packed.response_T, minlength=packed.responses).cumsum(0).cpu() - 1
    ended_R = torch.isin(packed.token_T.cpu()[last_R], torch.tensor(sorted(end_tokens), dtype=torch.int64))
    return {
        "tokens": float(len(entropy_T)),
        "entropy": entropy_T.sum().item(),
        "ended_responses": float(ended_R.sum()),
        "greedy_end": greedy_T[last_R][ended_R].sum().item(),
    }


def log_pi_sums(terms: Terms, packed: PackedBatch, score_R: torch.Tensor, sources: Sequence[str]) -> dict[str, float]:
    """Log pi summed over the tokens of right and of wrong responses, by source. Those without a verdict are left out.

    `sources`: "teacher" or "student" for each response.
    """
    (logp_T,) = _on_cpu(terms.logp_T)
    response_T, found = packed.response_T.cpu(), {}
    for source in ("teacher", "student"):
        is_source_R = torch.tensor([response_source == source for response_source in sources])
        for verdict, is_R in (("right", score_R >= RIGHT), ("wrong", score_R < RIGHT)):
            is_T = (is_source_R & is_R)[response_T]
            found[f"log_pi_{verdict}_{source}"] = logp_T[is_T].sum().item()
            found[f"tokens_{verdict}_{source}"] = float(is_T.sum())
    return found


def negative_sums(terms: Terms, advantage_T: torch.Tensor, packed: PackedBatch) -> dict[str, float]:
    """Return the number of tokens with A < 0 and pi < `RARE`, and their part of the squared reward gradient.

    The squared gradient of w A log pi with respect to a token's logits is |w_t A_t|^2 ||onehot - pi||^2, where the
    weight in the loss is w_t = 1 / (tokens of its response * responses of its question).
    """
    assert terms.squared_grad_T is not None
    weight_R = 1 / (torch.bincount(packed.response_T) * torch.bincount(packed.question_R)[packed.question_R])
    weighted_T = advantage_T * weight_R.to(advantage_T)[packed.response_T]
    logp_T, slope_T, weighted_T = _on_cpu(terms.logp_T, terms.squared_grad_T, weighted_T)
    squared_T, rare_T = weighted_T.square() * slope_T, (weighted_T < 0) & (logp_T.exp() < RARE)
    return {
        "rare_negatives": float(rare_T.sum()),
        "rare_negatives_gradient": squared_T[rare_T].sum().item(),
        "squared_reward_gradient": squared_T.sum().item(),
    }


def agreement(reward_R: torch.Tensor, score_R: torch.Tensor, packed: PackedBatch) -> tuple[float, float]:
    """Count pairs of a right and a wrong response to one question.

    Returns the pairs in which the right response has the larger reward (a tie counts half), and all pairs. Responses
    without a verdict or a reward (NaN) are left out.
    """
    agreeing = pairs = 0.0
    for members in packed.responses_by_question:
        reward_G, score_G = reward_R[members], score_R[members]
        known_G = ~reward_G.isnan()
        right_G, wrong_G = (reward_G[known_G & is_G] for is_G in (score_G >= RIGHT, score_G < RIGHT))
        agreeing += 0.5 * (1 + torch.sign(right_G[:, None] - wrong_G)).sum().item()
        pairs += len(right_G) * len(wrong_G)
    return agreeing, pairs


def _on_cpu(*values_T: torch.Tensor) -> torch.Tensor:
    """Stack vectors of one length, without gradients, on the CPU."""
    return torch.stack([value_T.detach().float() for value_T in values_T]).cpu().double()
