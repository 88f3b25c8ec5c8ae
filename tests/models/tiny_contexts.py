"""A training context of tiny random models with eight questions, some of them about one image."""

from functools import cache
from typing import Any, cast

import numpy as np
import torch

from masters.data.question_shards import QuestionRef
from masters.models.families import family_of
from masters.models.losses import formulas
from masters.models.packing.packed_batch import PackedBatch, pack, response_logits
from masters.models.training import trainer
from masters.models.training.groups import Group
from tests.models import tiny_models
from tests.models.paper import paper_rewards, paper_train

NAN = float("nan")
LENGTHS = [[3, 1, 5], [2, 2], [4], [1, 2, 3, 1], [2, 2, 2], [6, 1], [1, 1, 1, 1, 1], [3, 4]]
SCORES = [[1, 0, 1], [0, 1], [1], [1, NAN, 0, 0], [NAN, NAN, NAN], [1, NAN], [1, 0, 1, 0, 1], [1, 1]]

SHARED_IMAGE = 5  # the questions from this number on are about one image


@cache
def make_context(name: str) -> trainer.TrainContext:
    """Eight questions on a family's student, its masked teacher and a pi_ref that is not the student, so that the KL
    term has a gradient; no store, no optimizer."""
    student, teacher = tiny_models.model(name, seed=0), tiny_models.model(name, seed=1, ratio=0.2)
    groups = []
    for number, (lengths, scores) in enumerate(zip(LENGTHS, SCORES, strict=True)):
        responses = tiny_models.random_responses(number, lengths)
        if number in (1, 4):
            responses[1] = responses[0]
        keys = [("teacher", 0.2, sample) for sample in range(len(responses))]
        ref = QuestionRef("", f"q{number}", 0, number)
        is_trained = np.ones(len(responses), bool)
        groups.append(Group(ref, 0, None, responses, np.array(scores, dtype=float), is_trained, keys))
    return trainer.TrainContext(
        student=student,
        family=family_of(student.config.model_type),
        train=paper_train(),
        rewards=paper_rewards(),
        groups=groups,
        steps=[],
        ratios=[0.2],
        question=lambda group: tiny_models.question(
            student, group.ref.row, 3 + group.ref.row, group.responses, min(group.ref.row, SHARED_IMAGE)
        ),
        teacher=teacher,
        reference=tiny_models.model(name, seed=2),
        remask=lambda stage: None,
        storage=cast(Any, None),
        checkpoints="",
        checkpoint_steps=1,
        token_budget=10_000,
        report=lambda event: None,
    )


def packed(context: trainer.TrainContext, groups: list[int]) -> PackedBatch:
    return pack([context.question(context.groups[g]) for g in groups], context.student, context.family)


@torch.no_grad()
def references(context: trainer.TrainContext) -> dict[int, torch.Tensor]:
    """Stored log pi_ref of a reference that is not the student; none where `context.train` stores none."""
    made: dict[int, torch.Tensor] = {}
    if not context.train.stores_reference:
        return made
    for g in range(len(context.groups)):
        one = packed(context, [g])
        logits_TV = response_logits(context.student, one)
        noise = torch.randn(logits_TV.shape, generator=torch.Generator().manual_seed(g))
        made[g] = formulas.chosen_log_probs(logits_TV + 0.3 * noise, one.token_T)
    return made


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )
