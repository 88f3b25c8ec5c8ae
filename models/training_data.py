"""What the trainer trains on: groups (a question, its responses, their verdicts) and the order of steps."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from masters.models.schedule import stage_of
from masters.shards import Ref

Key = tuple[str, float | None, int]  # source, mask ratio (None but for a teacher's), sample


@dataclass(frozen=True)
class Group:
    """A question at one mask stage. `prompt` is None where the engine saw no prompt (training on labels).

    Responses of a table are 32-bit arrays.
    """

    ref: Ref
    stage: int
    prompt: np.ndarray | None
    responses: Sequence[Sequence[int]]
    scores: np.ndarray  # float64 [G], NaN where there is no verdict
    keys: list[Key]  # whose responses they are


@dataclass(frozen=True)
class Step:
    stage: int
    epoch: int
    groups: tuple[int, ...]


def label_groups(refs: list[Ref], answers: dict[str, list[int]], ratios: list[float], coverage: str) -> list[Group]:
    """Groups whose only response is the label's tokens, end token included."""
    groups = []
    for ref in refs:
        own = stage_of(ref.digest, len(ratios))
        for stage in range(len(ratios)) if coverage == "full" else [own]:
            label = ("label", None, 0)
            groups.append(Group(ref, stage, None, [answers[ref.question_id]], np.array([np.nan]), [label]))
    return groups


def plan_steps(groups: Sequence[Group], stages: int, epochs: int, questions_per_step: int, seed: int) -> list[Step]:
    """Stage by stage, within a stage epoch by epoch, shuffled by the seed; a batch never crosses either."""
    steps, members_of = [], [[] for _ in range(stages)]
    for number, group in enumerate(groups):
        members_of[group.stage].append(number)
    for stage, members in enumerate(members_of):
        for epoch in range(epochs):
            shuffled = members.copy()
            random.Random(f"{seed}/{stage}/{epoch}").shuffle(shuffled)
            steps += [
                Step(stage, epoch, tuple(shuffled[at : at + questions_per_step]))
                for at in range(0, len(shuffled), questions_per_step)
            ]
    return steps
