"""The training objective of one batch: L = L_GRPO + D (Eq. 4-11), with rewards computed from the forward pass.

Shapes: T response tokens of the batch, R responses of the batch, Q questions of the batch, G responses to one question.
Denominators (ours, the paper leaves them open): terms of a response are means over its tokens, those of a question
means over its responses, those of a step means over its questions on all ranks.

`is_trained_R`: whether a response adds to the loss; None: all do. Ours, after DAPO's overlong filtering (arXiv
2503.14476, 3.4): a masked response counts in its group's rewards, mean and deviation and in the denominators, and all
its terms are 0.
"""

from dataclasses import dataclass, field
from functools import partial

import torch

from masters.config import Rewards, Train
from masters.models.losses import formulas
from masters.models.losses.formulas import Terms
from masters.models.packing.packed_batch import PackedBatch
from masters.models.training.first_difference import spared_tokens
from masters.rewards.advantages import group_advantages
from masters.rewards.combination import combined_rewards
from masters.rewards.distillation import distillation_rewards, raw_distillation_rewards
from masters.rewards.verdict import RIGHT


@dataclass(frozen=True)
class Outcome:
    """Loss of a batch and what to log of it."""

    loss: torch.Tensor  # summed over questions: to be divided by the number of the step's questions
    sums: dict[str, float]  # metrics, summed over questions
    responses: dict[str, list[float]] = field(default_factory=dict)  # columns of the table `rewards`; NaN for no value
    advantage_T: torch.Tensor | None = None  # as in the loss, times the weight of `train.balance`; None without rewards


def question_means(value_R: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
    """Return the mean over each question's responses, [Q]: mean_j in Eq. 8-11; ours for D."""
    return formulas.response_means(value_R, packed.question_R, len(packed.responses_by_question))


def divergences(terms: Terms, packed: PackedBatch) -> torch.Tensor:
    """Return D_j = mean_t D_t of every response, [R] (Eq. 4-5; ours: the mean over its tokens)."""
    return formulas.response_means(terms.divergence_T, packed.response_T, packed.responses)


def mask_responses(value_R: torch.Tensor, is_trained_R: torch.Tensor | None) -> torch.Tensor:
    """Return the values, [R], with 0 for masked responses."""
    return value_R if is_trained_R is None else value_R * is_trained_R.to(value_R)


def supervised(
    logp_T: torch.Tensor,
    packed: PackedBatch,
    score_R: torch.Tensor | None = None,
    is_trained_R: torch.Tensor | None = None,
) -> Outcome:
    """Compute supervised fine-tuning, a baseline: - mean_j mean_t log pi(token), summed over questions.

    With verdicts R_acc in `score_R` the mean over j is over the question's right responses only (rejection sampling),
    masked ones left out. It is 0 for a question without any, which still counts in the step's mean over questions. NaN
    (no verdict) is not right.
    """
    loss_R = formulas.response_means(-logp_T, packed.response_T, packed.responses)
    if score_R is None:
        loss = question_means(loss_R, packed).sum()
        return Outcome(loss, {"loss": loss.item()})
    right_R = mask_responses((score_R >= RIGHT).to(loss_R), is_trained_R)
    right_Q = loss_R.new_zeros(len(packed.responses_by_question)).index_add(0, packed.question_R, right_R)
    loss = (right_R * loss_R / right_Q.clamp(min=1)[packed.question_R]).sum()
    return Outcome(loss, {"loss": loss.item(), "reward_accuracy": _question_sum(score_R.nan_to_num(0.0), packed)})


def distillation(terms: Terms, packed: PackedBatch, is_trained_R: torch.Tensor | None = None) -> Outcome:
    """Compute distillation without rewards: mean_j D_j (Eq. 4-5), summed over questions."""
    divergence_R = divergences(terms, packed)
    loss = question_means(mask_responses(divergence_R, is_trained_R), packed).sum()
    sums = {"loss": loss.item(), "divergence": _question_sum(divergence_R.detach(), packed)}
    return Outcome(loss, sums, {"divergence": divergence_R.tolist()})


def masters_loss(
    terms: Terms,
    score_R: torch.Tensor,
    packed: PackedBatch,
    train: Train,
    rewards: Rewards,
    by_teacher_R: torch.Tensor | None = None,
    is_trained_R: torch.Tensor | None = None,
) -> Outcome:
    """Compute distillation with offline GRPO: w L_GRPO + D (Eq. 4-11; ours: the weight w), summed over questions.

    `score_R`: verdicts R_acc, NaN where there is none. `by_teacher_R`: whether the teacher gave the response; needed by
    `balance = "teacher_accuracy"`. The rewards use D of this step, detached (Eq. 6-7). Ours: a response without a
    verdict has no advantage but keeps its D and KL terms.
    """
    divergence_R, kl_T = divergences(terms, packed), kl_term(terms, train)
    distill_R, advantage_R = advantages(divergence_R.detach().cpu(), score_R, packed, rewards, train.baseline_shift)
    advantage_R = mask_responses(advantage_R, is_trained_R)
    advantage_T = bounded_advantages(terms, advantage_R, score_R, packed, train.negatives)
    grpo_R = formulas.grpo_loss(
        terms.logp_T,
        advantage_T,
        torch.zeros_like(terms.logp_T) if kl_T is None else kl_T,
        packed.response_T,
        packed.responses,
        train.beta,
    )
    grpo_weight_R, distill_weight_R = loss_weights(score_R, packed, train, by_teacher_R)
    loss_R = grpo_weight_R * train.reward_weight * grpo_R + distill_weight_R * divergence_R
    loss = question_means(mask_responses(loss_R, is_trained_R), packed).sum()
    sums = {
        "loss": loss.item(),
        "divergence": _question_sum(divergence_R.detach(), packed),
        "reward_accuracy": _question_sum(score_R.nan_to_num(0.0), packed),
        "reward_distillation": _question_sum(distill_R, packed),
        "questions_with_advantage": float(
            sum(bool(advantage_R[members].any()) for members in packed.responses_by_question)
        ),
    }
    if kl_T is not None:
        kl_R = formulas.response_means(kl_T.detach(), packed.response_T, packed.responses)
        sums |= {"kl_to_reference": _question_sum(kl_R, packed), "largest_token_kl": kl_T.detach().max().item()}
    responses = {"divergence": divergence_R.tolist(), "advantage": advantage_R.tolist()}
    weighted_advantage_T = grpo_weight_R[packed.response_T] * advantage_T
    return Outcome(loss, sums, responses | _reward_columns(score_R, distill_R, rewards), weighted_advantage_T)


def loss_weights(
    score_R: torch.Tensor, packed: PackedBatch, train: Train, by_teacher_R: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights of L_GRPO and of D in the loss of each response, [R] each, according to `train.balance`.

    Ours: with "teacher_accuracy" D has the teacher's accuracy on the question as its weight, and L_GRPO the rest,
    because the distribution of a teacher that is often wrong is no target. Accuracy is the share of right responses
    among the teacher's responses with a verdict; 1 if there are none.
    """
    if train.balance == "sum":
        ones_R = torch.ones(len(score_R), device=packed.question_R.device)
        return ones_R, ones_R
    assert by_teacher_R is not None, 'balance = "teacher_accuracy" needs the source of each response'
    judged_R = by_teacher_R & ~score_R.isnan()
    judged_Q, right_Q = (
        torch.zeros(len(packed.responses_by_question)).index_add(0, packed.question_R.cpu(), counted_R.float())
        for counted_R in (judged_R, judged_R & (score_R >= RIGHT))
    )
    accuracy_Q = torch.where(judged_Q > 0, right_Q / judged_Q.clamp(min=1), 1.0)
    accuracy_R = accuracy_Q.to(packed.question_R.device)[packed.question_R]
    return 1 - accuracy_R, accuracy_R


def bounded_advantages(
    terms: Terms, advantage_R: torch.Tensor, score_R: torch.Tensor, packed: PackedBatch, negatives: str
) -> torch.Tensor:
    """Return each token's advantage, [T], without gradient: A of its response; below 0 as `negatives` bounds it."""
    advantage_T = advantage_R.to(packed.response_T.device)[packed.response_T]
    spared_T = spared_tokens(packed, score_R) if negatives == "first_difference" else None
    return formulas.token_advantages(terms, advantage_T, negatives, spared_T)


def kl_term(terms: Terms, train: Train) -> torch.Tensor | None:
    """Return D_KL(pi || pi_ref) of each token, [T], as `train.kl` estimates it. None if pi_ref is not known."""
    if train.kl == "exact" or terms.reference_logp_T is None:
        return terms.kl_T
    return formulas.kl_to_reference(terms.logp_T, terms.reference_logp_T, train.kl)


def _reward_columns(score_R: torch.Tensor, distill_R: torch.Tensor, rewards: Rewards) -> dict[str, list[float]]:
    """Return R_acc, R_distill and their combination R; all NaN for a response that lacks the verdict it needs."""
    nan_R = torch.full_like(score_R, torch.nan)
    reward_R = combined_rewards(
        torch.zeros_like(score_R) if rewards.accuracy == "off" else score_R, distill_R, rewards.combine
    )
    distillation_R = nan_R if rewards.distillation == "off" else torch.where(reward_R.isnan(), nan_R, distill_R)
    accuracy_R = nan_R if rewards.accuracy == "off" else score_R
    return {
        "reward_accuracy": accuracy_R.tolist(),
        "reward_distillation": distillation_R.tolist(),
        "reward": reward_R.tolist(),
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
    """Return R_distill and A, [R] each, computed within each question's group of responses (Eq. 6-8). No gradients.

    Ours: a response without a verdict is left out of its group's minimum, maximum, mean and standard deviation;
    identical responses share one D.
    """
    distill_R, advantage_R = torch.zeros_like(divergence_R), torch.zeros_like(divergence_R)
    floors = (rewards.distillation_floor, rewards.distillation_relative_floor)
    distillation_reward = {"minmax": partial(distillation_rewards, floors=floors), "raw": raw_distillation_rewards}
    for members in packed.responses_by_question:
        score_G = torch.zeros(len(members)) if rewards.accuracy == "off" else score_R[members]
        is_valid_G = ~score_G.isnan()
        if rewards.distillation != "off":
            same_G = [packed.sequence_id_R[response] for response in members]
            distill_R[members] = distillation_reward[rewards.distillation](divergence_R[members], is_valid_G, same_G)
        reward_G = combined_rewards(score_G, distill_R[members], rewards.combine)
        advantage_R[members] = group_advantages(torch.where(is_valid_G, reward_G, torch.nan), baseline_shift)
    return distill_R, advantage_R
