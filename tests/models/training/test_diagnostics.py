"""Diagnostics of a step equal those computed from full float64 logits with plain loops."""

import copy
import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from demo import families
from masters.models.packing.packed_batch import response_logits
from masters.models.packing.prefix_tree import TokenCounts
from masters.models.training import step_metrics, trainer
from masters.models.training.groups import Step
from tests.models import float64_reference
from tests.models.float64_reference import Batch, log_pi, softmax
from tests.models.paper import paper_train
from tests.models.tiny_contexts import make_context, packed

EVERYTHING = Step(0, 0, tuple(range(8)))


def sharpened(context: trainer.TrainContext, **train: object) -> trainer.TrainContext:
    """Return the context with a student whose distributions are sharp, so that some response tokens are rare.

    Responses have both sources. Every other response ends with the student's greedy choice.
    """
    student = copy.deepcopy(context.student)
    with torch.no_grad():
        student.lm_head.weight *= 40  # pyright: ignore
    made = replace(context, student=student, train=paper_train(**train), token_counts=TokenCounts())
    groups = []
    for g, group in enumerate(context.groups):
        with torch.no_grad():
            best = response_logits(student, packed(made, [g])).argmax(-1)
        ends = np.cumsum([len(response) for response in group.responses]) - 1
        responses = [
            [*r[:-1], int(best[end]) if n % 2 else r[-1]]
            for n, (r, end) in enumerate(zip(group.responses, ends, strict=True))
        ]
        keys = [(("teacher", "student")[n % 2], None, n) for n in range(len(responses))]
        groups.append(replace(group, responses=responses, keys=keys))
    ends = {r[-1] for group in groups[:5] for r in group.responses}  # others were cut at the length limit
    return replace(made, groups=groups, end_tokens=frozenset(ends))


def batch_of(context: trainer.TrainContext) -> Batch:
    """Return the questions of the context with full logits of all three models."""
    with torch.no_grad():
        pack = packed(context, list(range(len(context.groups))))
        logits = [
            response_logits(m, pack).double().numpy() for m in (context.student, context.teacher, context.reference)
        ]
    tokens = [[tuple(r) for r in group.responses] for group in context.groups]
    return Batch(tokens, [group.scores.tolist() for group in context.groups], *logits)


def plain(context: trainer.TrainContext, batch: Batch) -> dict[str, list[float]]:
    """Return the values that each diagnostic is a mean of."""
    result, q = float64_reference.objective(batch, context.train, context.rewards), softmax(batch.student_TV)
    logp_T, found = log_pi(batch.student_TV, batch.token_T), {name: [] for name in step_metrics.DENOMINATORS}
    gradient = [0.0, 0.0]
    r = 0
    for group, responses, spans in zip(
        context.groups, batch.questions, float64_reference.token_spans(batch), strict=True
    ):
        known = [
            (s >= 0.5, result.distill_R[r + j], result.reward_R[r + j])
            for j, s in enumerate(group.scores)
            if not math.isnan(s)
        ]
        for (right, *best), (wrong, *worst) in product(known, known):
            if right and not wrong:
                for name, a, b in zip(("distillation_agreement", "reward_agreement"), best, worst, strict=True):
                    found[name].append(0.5 if abs(a - b) < 1e-9 else float(a > b))
        for j, (tokens, span) in enumerate(zip(responses, spans, strict=True)):
            if not math.isnan(group.scores[j]):
                verdict = "right" if group.scores[j] >= 0.5 else "wrong"
                found[f"log_pi_{verdict}_{group.keys[j][0]}"] += list(logp_T[span])
            if tokens[-1] in context.end_tokens:
                found["greedy_end"].append(float(q[span][-1].argmax() == tokens[-1]))
            for t, token in zip(range(span.start, span.stop), tokens, strict=True):
                onehot = np.eye(q.shape[1])[token]
                found["entropy"].append(-(q[t] * np.log(q[t])).sum())
                rare = result.advantage_R[r + j] < 0 and q[t][token] < 1e-3
                found["rare_negatives"].append(float(rare))
                weight = 1 / (len(tokens) * len(responses))  # mean over tokens, mean over responses
                squared = (weight * result.advantage_R[r + j]) ** 2 * ((onehot - q[t]) ** 2).sum()
                gradient = [gradient[0] + squared * rare, gradient[1] + squared]
        r += len(responses)
    found["rare_negatives_gradient"] = [gradient[0] / gradient[1]]
    found["largest_token_kl"] = [float64_reference.kl_term(batch.student_TV, batch, context.train.kl).max()]
    return found


@pytest.mark.parametrize("name", families.NAMES)
def test_diagnostics_equal_those_from_full_logits(name: str) -> None:
    context = sharpened(make_context(name))
    expected = {name: float(np.mean(values)) for name, values in plain(context, batch_of(context)).items()}
    sums = trainer.run_step(replace(context, token_budget=60), EVERYTHING, {})  # several passes
    found = step_metrics.means(sums, len(context.groups))
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name
    assert 0 < found["greedy_end"] < 1 and 0 < sums["ended_responses"] < sums["tokens"]
    assert 0 < found["rare_negatives"] < found["rare_negatives_gradient"] < 1
    assert sums["pairs_reward"] > 4


@pytest.mark.parametrize(("negatives", "rare"), [("full", True), ("none", False)])
def test_diagnostics_use_the_advantages_of_the_loss(negatives: str, rare: bool) -> None:
    sums = trainer.run_step(sharpened(make_context("qwen3_vl"), negatives=negatives), EVERYTHING, {})
    assert (sums["rare_negatives"] > 0) == (sums["rare_negatives_gradient"] > 0) == rare


@pytest.mark.parametrize(
    ("train", "present"),
    [(dict(objective="kd"), {"entropy", "greedy_end"}), (dict(objective="sft", targets="labels"), set())],
)
def test_other_objectives_have_the_diagnostics_that_apply(train: dict, present: set[str]) -> None:
    context = sharpened(make_context("qwen3_vl"), **train)
    if train["objective"] == "sft":
        context = replace(context, teacher=None)
    found = step_metrics.means(trainer.run_step(context, EVERYTHING, {}), len(context.groups))
    assert found.keys() & (step_metrics.DENOMINATORS.keys() | step_metrics.LARGEST) == present
