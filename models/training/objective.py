"""The training objective of one batch: L = L_GRPO + D (Eq. 4-11), rewards computed between forward and backward.

Shapes: T response tokens of the batch, R responses of the batch, G responses of one question.
Denominators (ours, the paper leaves them open): a response's terms are means over its tokens, a question's over its
responses, the batch's over its questions (all questions of the step, on every process).
"""

from dataclasses import dataclass, field
from functools import partial

import torch

from masters.config import Rewards, Train
from masters.models.losses import formulas
from masters.models.losses.formulas import Terms
from masters.models.packing.packed_batch import PackedBatch
from masters.models.training.first_difference import RIGHT, spared_tokens
from masters.rewards.advantages import group_advantages
from masters.rewards.combination import combined_rewards
from masters.rewards.distillation import distillation_rewards, raw_distillation_rewards


@dataclass(frozen=True)
class Outcome:
    """A batch's loss (to be divided by the step's questions), what to log, summed over questions, and by response.

    `responses`: columns of the table `rewards`, R values each, NaN where there is none. `advantage_T`: of each token,
    times the share that `train.balance` gives it, as it is in the loss; None in objectives without rewards.
    """

    loss: torch.Tensor
    sums: dict[str, float]
    responses: dict[str, list[float]] = field(default_factory=dict)
    advantage_T: torch.Tensor | None = None


def question_means(value_R: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
    """Mean over each question's responses, [B]: mean_j in Eq. 8-11, and ours for D."""
    return formulas.response_means(value_R, packed.question_R, len(packed.asked))


def divergences(terms: Terms, packed: PackedBatch) -> torch.Tensor:
    """D_j = mean_t D_t of every response, [R] (Eq. 4-5; ours: the mean over its tokens)."""
    return formulas.response_means(terms.divergence_T, packed.response_T, packed.responses)


def supervised(logp_T: torch.Tensor, packed: PackedBatch, score_R: torch.Tensor | None = None) -> Outcome:
    """Plain fine-tuning, a baseline: - mean_j mean_t log pi(token), from log pi, [T], summed over questions.

    With verdicts R_acc in `score_R` the mean is over the question's right responses alone (rejection sampling), 0
    where there is none: such a question still counts in the batch's mean over questions. NaN, no verdict, is not right.
    """
    loss_R = formulas.response_means(-logp_T, packed.response_T, packed.responses)
    if score_R is None:
        loss = question_means(loss_R, packed).sum()
        return Outcome(loss, {"loss": loss.item()})
    right_R = (score_R >= RIGHT).to(loss_R)
    right_Q = loss_R.new_zeros(len(packed.asked)).index_add(0, packed.question_R, right_R)
    loss = (right_R * loss_R / right_Q.clamp(min=1)[packed.question_R]).sum()
    return Outcome(loss, {"loss": loss.item(), "reward_accuracy": _question_sum(score_R.nan_to_num(0.0), packed)})


def distillation(terms: Terms, packed: PackedBatch) -> Outcome:
    """Distillation alone: mean_j D_j (Eq. 4-5), summed over questions."""
    divergence_R = divergences(terms, packed)
    loss = question_means(divergence_R, packed).sum()
    return Outcome(loss, {"loss": loss.item(), "divergence": loss.item()}, {"divergence": divergence_R.tolist()})


def masters_loss(
    terms: Terms,
    score_R: torch.Tensor,
    packed: PackedBatch,
    train: Train,
    rewards: Rewards,
    taught_R: torch.Tensor | None = None,
) -> Outcome:
    """Distillation and offline GRPO: w L_GRPO + D (Eq. 4-11; ours: the weight w), summed over questions.

    `score_R` are the verdicts R_acc, NaN where there is none. D is that of this very step, detached in the rewards
    (Eq. 6-7). Ours: a response without a verdict has no advantage and keeps its D and KL terms. `taught_R`: which
    responses are a teacher's; `balance = "teacher_accuracy"` needs it.
    """
    divergence_R, kl_T = divergences(terms, packed), kl_term(terms, train)
    distill_R, advantage_R = advantages(divergence_R.detach().cpu(), score_R, packed, rewards, train.baseline_shift)
    advantage_T = bounded_advantages(terms, advantage_R, score_R, packed, train.negatives)
    grpo_R = formulas.grpo_loss(
        terms.logp_T, advantage_T, torch.zeros_like(terms.logp_T) if kl_T is None else kl_T,
        packed.response_T, packed.responses, train.beta,
    )  # fmt: skip
    reward_share_R, distill_share_R = shares(score_R, packed, train, taught_R)
    loss_R = reward_share_R * train.reward_weight * grpo_R + distill_share_R * divergence_R
    loss = question_means(loss_R, packed).sum()
    sums = {
        "loss": loss.item(),
        "divergence": _question_sum(divergence_R.detach(), packed),
        "reward_accuracy": _question_sum(score_R.nan_to_num(0.0), packed),
        "reward_distillation": _question_sum(distill_R, packed),
        "questions_with_advantage": float(sum(bool(advantage_R[own].any()) for own in packed.asked)),
    }
    if kl_T is not None:
        kl_R = formulas.response_means(kl_T.detach(), packed.response_T, packed.responses)
        sums |= {"kl_to_reference": _question_sum(kl_R, packed), "largest_token_kl": kl_T.detach().max().item()}
    responses = {"divergence": divergence_R.tolist(), "advantage": advantage_R.tolist()}
    given_T = reward_share_R[packed.response_T] * advantage_T
    return Outcome(loss, sums, responses | _rewards(score_R, distill_R, rewards), given_T)


def shares(
    score_R: torch.Tensor, packed: PackedBatch, train: Train, taught_R: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of L_GRPO and of D in the loss of each response, [R] each, as `train.balance` says.

    Ours: "teacher_accuracy" gives D the share of the teacher's responses to the question that are right, and L_GRPO
    the rest: where the teacher is often wrong its distribution is no target. Of responses with a verdict; 1 and 0 in a
    question without one.
    """
    one_R = torch.ones(len(score_R), device=packed.question_R.device)
    if train.balance == "sum":
        return one_R, one_R
    assert taught_R is not None, "the balance needs to know whose responses there are"
    known_R = taught_R & ~score_R.isnan()
    known_Q, right_Q = (
        torch.zeros(len(packed.asked)).index_add(0, packed.question_R.cpu(), of_R.float())
        for of_R in (known_R, known_R & (score_R >= RIGHT))
    )
    trust_Q = torch.where(known_Q > 0, right_Q / known_Q.clamp(min=1), 1.0)
    trust_R = trust_Q.to(packed.question_R.device)[packed.question_R]
    return 1 - trust_R, trust_R


def bounded_advantages(
    terms: Terms, advantage_R: torch.Tensor, score_R: torch.Tensor, packed: PackedBatch, negatives: str
) -> torch.Tensor:
    """The advantage of each token, [T], from A of its response, bounded below 0 as `negatives` says; no gradient."""
    advantage_T = advantage_R.to(packed.response_T.device)[packed.response_T]
    spared_T = spared_tokens(packed, score_R) if negatives == "first_difference" else None
    return formulas.token_advantages(terms, advantage_T, negatives, spared_T)


def kl_term(terms: Terms, train: Train) -> torch.Tensor | None:
    """D_KL(pi || pi_ref) of each token, [T], as `train.kl` says. None where pi_ref is not known."""
    if train.kl == "exact" or terms.reference_logp_T is None:
        return terms.kl_T
    return formulas.kl_to_reference(terms.logp_T, terms.reference_logp_T, train.kl)


def _rewards(score_R: torch.Tensor, distill_R: torch.Tensor, rewards: Rewards) -> dict[str, list[float]]:
    """R_acc, R_distill and R of both; all NaN where a verdict was wanted and there is none."""
    none_R = torch.full_like(score_R, torch.nan)
    rewarded_R = combined_rewards(
        torch.zeros_like(score_R) if rewards.accuracy == "off" else score_R, distill_R, rewards.combine
    )
    given_R = none_R if rewards.distillation == "off" else torch.where(rewarded_R.isnan(), none_R, distill_R)
    accuracy_R = none_R if rewards.accuracy == "off" else score_R
    return {
        "reward_accuracy": accuracy_R.tolist(),
        "reward_distillation": given_R.tolist(),
        "reward": rewarded_R.tolist(),
    }


def _question_sum(value_R: torch.Tensor, packed: PackedBatch) -> float:
    return question_means(value_R.to(packed.question_R.device), packed).sum().item()


def advantages(
    divergence_R: torch.Tensor,
    score_R: torch.Tensor,
    packed: PackedBatch,
    rewards: Rewards,
    baseline_shift: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """R_distill and A, [R] each, from the rewards R of each question's group by itself (Eq. 6-8).

    Nothing here has a gradient. Ours: a response without a verdict takes no part in its group's minimum, maximum,
    mean and deviation; identical responses share one D.
    """
    distill_R, advantage_R = torch.zeros_like(divergence_R), torch.zeros_like(divergence_R)
    for own in packed.asked:
        of = torch.tensor(own)
        valid_G = torch.ones(len(of), dtype=torch.bool) if rewards.accuracy == "off" else ~score_R[of].isnan()
        reward_G = torch.zeros(len(of)) if rewards.accuracy == "off" else score_R[of]
        if rewards.distillation != "off":
            same_G = [packed.same_R[response] for response in own]
            floors = (rewards.distillation_floor, rewards.distillation_relative_floor)
            scaled = partial(distillation_rewards, floors=floors)
            give = {"minmax": scaled, "raw": raw_distillation_rewards}[rewards.distillation]
            distill_R[of] = give(divergence_R[of], valid_G, same_G)
        rewarded_G = combined_rewards(reward_G, distill_R[of], rewards.combine)
        advantage_R[of] = group_advantages(torch.where(valid_G, rewarded_G, torch.nan), baseline_shift)
    return distill_R, advantage_R
