"""Mutation tests: the comparisons with the reference must fail for each fault put into the code's source."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from masters.config import mask_schedule
from masters.models import masking
from masters.models.losses import formulas
from masters.models.training import first_difference, objective
from masters.rewards import advantages, combination, distillation
from tests.models import float64_reference
from tests.models.compare_with_reference import check_all
from tests.models.mutation import Edit, mutate

OBJECTIVE: dict[str, list[Edit]] = {
    "the advantage's sign": [(formulas, "grpo_loss", "ratio_T * advantage_T", "-ratio_T * advantage_T")],
    "negatives not clipped": [
        (
            formulas,
            "token_advantages",
            "torch.where(advantage_T < 0, advantage_T * weight_T, advantage_T)",
            "advantage_T",
        )
    ],
    "positive advantages clipped too": [(formulas, "token_advantages", "advantage_T < 0, ", "advantage_T < 9, ")],
    "a weight of negatives above one": [(formulas, "token_advantages", ".clamp(max=1.0)", "")],
    "negatives not dropped": [
        (formulas, "token_advantages", "return advantage_T.clamp(min=0.0)", "return advantage_T")
    ],
    "shared tokens not spared": [
        (formulas, "token_advantages", "advantage_T.clamp(min=0.0), advantage_T)", "advantage_T, advantage_T)")
    ],
    "positive advantages spared too": [
        (formulas, "token_advantages", "torch.where(spared_T, advantage_T.clamp(min=0.0)", "torch.where(spared_T, 0.0")
    ],
    "tokens of wrong responses spared": [(first_difference, "spared_tokens", "if right_R[r]", "if True")],
    "the shortest shared prefix": [(first_difference, "spared_tokens", "shared = max(", "shared = min(")],
    "one spared token too many": [(first_difference, "spared_tokens", "t < shared", "t <= shared")],
    "a sum where rewards are gated": [(combination, "combined_rewards", "accuracy_G * (1 + ", "accuracy_G + (0 + ")],
    "no baseline shift": [(advantages, "group_advantages", " - baseline_shift", "")],
    "no weight of the rewards": [(objective, "masters_loss", "train.reward_weight * ", "")],
    "the balance of all responses": [(objective, "loss_weights", "by_teacher_R & ~score_R", "~score_R")],
    "the balance reversed": [(objective, "loss_weights", "1 - accuracy_R, accuracy_R", "accuracy_R, 1 - accuracy_R")],
    "no trust without a verdict": [(objective, "loss_weights", "clamp(min=1), 1.0)", "clamp(min=1), 0.0)")],
    "no relative floor": [(distillation, "distillation_rewards", "floors[1] * d", "0 * d")],
    "no floor in nats": [(distillation, "distillation_rewards", "max(floors[0], ", "max(0.0, ")],
    "the KL term's sign": [(formulas, "grpo_loss", "- beta *", "+ beta *")],
    "no KL term": [(formulas, "grpo_loss", "- beta *", "- 0 * beta *")],
    "the exact KL reversed": [(formulas, "exact_kl", "_expected_log_ratio(q, r)", "_expected_log_ratio(r, q)")],
    "the exact KL from the teacher": [
        (formulas, "token_terms", "exact_kl(student_logits_TV, reference", "exact_kl(student_logits_TV, teacher")
    ],
    "an estimate for the exact KL": [(objective, "kl_term", 'train.kl == "exact" or', "False or")],
    "the KL estimator reversed": [
        (formulas, "kl_to_reference", "reference_logp_T - logp_T", "logp_T - reference_logp_T")
    ],
    "no tangent beyond the clip": [(formulas, "kl_to_reference", "math.expm1(1) * (d - near)", "0 * d")],
    "a k3 that is clipped": [(formulas, "kl_to_reference", 'if estimator == "clipped" else d', "if estimator else d")],
    "the square without its half": [(formulas, "kl_to_reference", "0.5 * d.square()", "d.square()")],
    "a ratio without gradient": [(formulas, "grpo_loss", "exp(logp_T - ", "exp(logp_T.detach() - ")],
    "M in logit space": [
        (
            formulas,
            "jensen_shannon",
            "torch.logaddexp(p.masked_fill(absent, 0.0), q.masked_fill(absent, 0.0)) - LN2",
            "((p.clamp(min=-50) + q.clamp(min=-50)) / 2).log_softmax(-1)",
        )
    ],
    "only one half of the divergence": [
        (
            formulas,
            "jensen_shannon",
            "_expected_log_ratio(p, m) + _expected_log_ratio(q, m)",
            "_expected_log_ratio(p, m)",
        )
    ],
    "a mixture of other shares": [(formulas, "skew_divergence", "math.log(1 - SKEW)", "math.log(SKEW)")],
    "KL in the wrong direction": [
        (formulas, "kl_divergence", "_expected_log_ratio(p, q)", "_expected_log_ratio(q, p)")
    ],
    "a gradient to the teacher": [(formulas, "_log_probs", "teacher_logits_TV.detach()", "teacher_logits_TV")],
    "a gradient through the rewards": [
        (formulas, "grpo_loss", "advantage_T.detach()", "advantage_T"),
        (advantages, "group_advantages", "torch.as_tensor(reward_G).detach()", "torch.as_tensor(reward_G)"),
        (distillation, "_prepare", "torch.as_tensor(divergence_G).detach()", "torch.as_tensor(divergence_G)"),
    ],
    "min-max over the batch": [
        (
            objective,
            "advantages",
            "(divergence_R[members], is_valid_G, same_G)",
            '(divergence_R, None if rewards.accuracy == "off" else ~score_R.isnan())[members]',
        )
    ],
    "min-max not reversed": [
        (distillation, "distillation_rewards", "highest - d[valid]) /", "d[valid] - lowest) /"),
    ],
    "mean and deviation over the batch": [
        (
            objective,
            "advantages",
            "    return distill_R",
            "    advantage_R = group_advantages(score_R + distill_R)\n    return distill_R",
        )
    ],
    "the sample's deviation": [(advantages, "group_advantages", "correction=0", "correction=1")],
    "advantages not standardized": [(advantages, "group_advantages", ") / deviation", ")")],
    "a sum over tokens in the divergence": [
        (
            objective,
            "divergences",
            "formulas.response_means(terms.divergence_T, packed.response_T, packed.responses)",
            "torch.zeros(packed.responses).index_add(0, packed.response_T, terms.divergence_T)",
        )
    ],
    "a sum over tokens in GRPO": [
        (
            formulas,
            "grpo_loss",
            "-response_means(gain_T, response_T, responses)",
            "-torch.zeros(responses).index_add(0, response_T, gain_T)",
        )
    ],
    "a sum over tokens and responses": [(formulas, "response_means", "return sums /", "return sums  #")],
    "a mean over the batch's responses": [
        (
            objective,
            "question_means",
            "return formulas",
            "return value_R.mean() * torch.ones(int(packed.question_R.max()) + 1)\n    return formulas",
        )
    ],
    "no shared divergence": [(distillation, "_prepare", "d[identical] = d[identical].mean()", "pass")],
    "a missing verdict taken for 0": [
        (
            objective,
            "advantages",
            "is_valid_G = ~score_G.isnan()",
            "score_G = score_G.nan_to_num(0.0); is_valid_G = ~score_G.isnan()",
        )
    ],
    "no divergence in the loss": [
        (objective, "masters_loss", "weight_R * divergence_R", "weight_R * divergence_R.detach()")
    ],
    "fine-tuning on wrong responses too": [(objective, "supervised", "score_R >= RIGHT", "score_R >= 0")],
    "half right is wrong": [(objective, "supervised", "score_R >= RIGHT", "score_R > RIGHT")],
    "a mean over all of a question's responses": [
        (
            objective,
            "supervised",
            "right_Q.clamp(min=1)[packed.question_R]",
            "torch.bincount(packed.question_R)[packed.question_R]",
        )
    ],
    "a sum over a question's right responses": [
        (objective, "supervised", " / right_Q.clamp(min=1)[packed.question_R]", "")
    ],
    "a question without a right response divides by 0": [(objective, "supervised", ".clamp(min=1)", "")],
    "no accuracy reward": [(objective, "advantages", "combined_rewards(score_G, ", "combined_rewards(0 * score_G, ")],
}

OTHERS: dict[str, list[Edit]] = {
    "ties are zeroed": [(masking, "_is_kept", ">= threshold", "> threshold")],
    "the signed weight is compared": [(masking, "_is_kept", "weight.abs()", "weight")],
    "a rank too high": [
        (masking, "order_index", "math.floor(Fraction(str(ratio)) * count)", "math.ceil(ratio * count)")
    ],
    "a rank in floats": [(masking, "order_index", "Fraction(str(ratio))", "ratio")],
    "stages from the bottom": [(mask_schedule, "mask_ratios", "range(count, -1, -1)", "range(count + 1)")],
    "a stage too late": [(mask_schedule, "mask_ratio", "iteration * len", "(iteration - 1) * len")],
    "one stage too many": [(mask_schedule, "mask_stage_of", "* stages", "* (stages + 1)")],
}


def check_masks_and_schedule() -> None:
    ratios = [0.0, 0.05, 0.1, 0.29, 0.5, 1.0]
    for weight in (torch.arange(-50.0, 50.0), torch.tensor([1.0, -1.0, 2.0, 0.0, -2.0, 0.5, 3.0])):
        for ratio, limit in zip(ratios, masking.magnitude_thresholds(weight, ratios), strict=True):
            assert limit == float64_reference.threshold(weight.numpy(), ratio)
            np.testing.assert_array_equal(
                masking.apply_mask(weight, limit), float64_reference.masked(weight.numpy(), limit)
            )
    for i in range(1, 14):
        expected = float64_reference.mask_ratio(i, 13, Fraction("0.2"), Fraction("0.05"))
        assert mask_schedule.mask_ratio(i, 13, 0.2, 0.05) == float(expected)
        digest = f"{i:x}" + "7" * 63
        assert mask_schedule.mask_stage_of(digest, 5) == float64_reference.stage(digest, 5)


def test_unchanged_code_passes() -> None:
    check_all()
    check_masks_and_schedule()


@pytest.mark.parametrize("fault", OBJECTIVE)
def test_a_fault_in_the_objective_is_detected(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, OBJECTIVE[fault])
    with pytest.raises(AssertionError):
        check_all()


@pytest.mark.parametrize("fault", OTHERS)
def test_a_fault_in_masks_or_schedule_is_detected(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, OTHERS[fault])
    with pytest.raises(AssertionError):
        check_masks_and_schedule()
