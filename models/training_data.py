"""What the trainer trains on: groups (a question, its responses, their verdicts) and the order of steps."""

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from masters.artifacts import Artifact
from masters.models.schedule import stage_of
from masters.shards import Ref

Key = tuple[str, float | None, int]  # source, mask ratio (None but for a teacher's), sample


@dataclass(frozen=True)
class Group:
    """A question at one mask stage. `prompt` is None where the engine saw no prompt (training on labels).

    Responses of a table are 32-bit arrays: a list of Python's integers would take nine times as much.
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


def response_groups(
    refs: list[Ref], responses: Artifact, verdicts: Artifact | None, ratios: list[float], coverage: str
) -> tuple[list[Group], int]:
    """Groups of every question at the stages that train on it, and how many responses were set aside as empty."""
    scores = _scores(verdicts) if verdicts else {}
    prompts, answered, empty = {}, {}, 0
    columns = ["question_id", "source", "mask_ratio", "sample", "prompt_token_ids", "response_token_ids"]
    for row in responses.rows("responses", columns):
        if not row["response_token_ids"]:
            empty += 1
            continue
        prompts.setdefault(row["question_id"], np.asarray(row["prompt_token_ids"], dtype=np.int32))
        own = (row["source"], row["mask_ratio"], row["sample"])
        score = scores.get((row["question_id"], *own))
        order = (row["source"] != "teacher", row["sample"])
        said = (order, array("i", row["response_token_ids"]), np.nan if score is None else score, own)
        answered.setdefault((row["question_id"], row["mask_ratio"]), []).append(said)
    groups = []
    for ref in refs:
        own = stage_of(ref.digest, len(ratios))
        for stage in range(len(ratios)) if coverage == "full" else [own]:
            found = sorted(
                answered.get((ref.question_id, ratios[stage]), []) + answered.get((ref.question_id, None), []),
                key=lambda r: r[0],
            )
            if found:
                values = np.array([r[2] for r in found])
                keys = [r[3] for r in found]
                groups.append(Group(ref, stage, prompts[ref.question_id], [r[1] for r in found], values, keys))
    return groups, empty


def label_groups(refs: list[Ref], answers: dict[str, list[int]], ratios: list[float], coverage: str) -> list[Group]:
    """Groups whose only response is the label's tokens, end token included."""
    groups = []
    for ref in refs:
        own = stage_of(ref.digest, len(ratios))
        for stage in range(len(ratios)) if coverage == "full" else [own]:
            label = ("label", None, 0)
            groups.append(Group(ref, stage, None, [answers[ref.question_id]], np.array([np.nan]), [label]))
    return groups


def plan_steps(groups: list[Group], stages: int, epochs: int, questions_per_step: int, seed: int) -> list[Step]:
    """Stage by stage, within a stage epoch by epoch, shuffled by the seed; a batch never crosses either."""
    steps = []
    for stage in range(stages):
        members = [i for i, group in enumerate(groups) if group.stage == stage]
        for epoch in range(epochs):
            shuffled = members.copy()
            random.Random(f"{seed}/{stage}/{epoch}").shuffle(shuffled)
            steps += [
                Step(stage, epoch, tuple(shuffled[at : at + questions_per_step]))
                for at in range(0, len(shuffled), questions_per_step)
            ]
    return steps


def _scores(verdicts: Artifact) -> dict[tuple, float | None]:
    columns = ["question_id", "source", "mask_ratio", "sample", "score"]
    return {
        (row["question_id"], row["source"], row["mask_ratio"], row["sample"]): row["score"]
        for row in verdicts.rows("verdicts", columns)
    }
