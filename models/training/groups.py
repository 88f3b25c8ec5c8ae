"""What the trainer trains on: groups (a question, its responses, their verdicts) and the order of steps.

The groups of a table of responses are held in columns, 28 bytes a response and 4 a token, of a run of any size; a
`Group` is made when it is asked for. Shapes: R responses that are not empty, T their tokens, P prompt tokens, Q
questions, G groups.
"""

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute

from masters.common.errors import MastersError
from masters.config.mask_schedule import stage_of
from masters.data.question_shards import Ref
from masters.store.artifacts import Artifact

Key = tuple[str, float | None, int]  # source, mask ratio (None but for a teacher's), sample

pc: Any = pyarrow.compute  # its functions are made when it is imported, out of a type checker's sight
COLUMNS = ["question_id", "source", "mask_ratio", "sample"]
SOURCES = ("teacher", "student")  # in the order in which a group has them
# bits of a response's place: question, source, mask ratio (0: none, STRANGE: of no stage), sample
QUESTION, SOURCE, RATIO = 28, 26, 16
STRANGE = 2**10 - 1


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


class ResponseGroups(Sequence[Group]):
    """Groups of every question at the stages that train on it, in the order of `refs`, then of stages.

    `only`: the one stage whose groups are made; None: all of them.
    """

    def __init__(
        self, refs: Sequence[Ref], told: "Responses", scores_R: np.ndarray, ratios: list[float], full: bool,
        only: int | None = None,
    ) -> None:  # fmt: skip
        self._refs, self._told, self._scores_R, self._ratios = refs, told, scores_R, ratios
        self._from_Q = np.searchsorted(told.place_R, np.arange(len(refs) + 1, dtype=np.int64) << QUESTION)
        every = range(len(ratios))
        asked = ((q, s) for q, ref in enumerate(refs) for s in (every if full else [stage_of(ref.digest, len(ratios))]))
        there = ((q, s) for q, s in asked if only in (None, s) and len(self._members(q, s)))
        self._group_G2 = np.fromiter(there, np.dtype((np.int32, 2)))

    def __len__(self) -> int:
        return len(self._group_G2)

    @overload
    def __getitem__(self, at: int) -> Group: ...
    @overload
    def __getitem__(self, at: slice) -> list[Group]: ...
    def __getitem__(self, at: int | slice) -> Group | list[Group]:
        if isinstance(at, slice):
            return [self[g] for g in range(len(self))[at]]
        question, stage = (int(number) for number in self._group_G2[at])
        members = self._members(question, stage)
        responses = [self._told.tokens(r) for r in members]
        keys = [self._key(int(self._told.place_R[r])) for r in members]
        return Group(self._refs[question], stage, self._told.prompt(question), responses, self._scores_R[members], keys)

    def _members(self, question: int, stage: int) -> np.ndarray:
        """Responses at this stage and those at none (the student's)."""
        rows = np.arange(self._from_Q[question], self._from_Q[question + 1])
        ratio = (self._told.place_R[rows] >> RATIO) & STRANGE
        return rows[(ratio == stage + 1) | (ratio == 0)]

    def _key(self, place: int) -> Key:
        ratio = (place >> RATIO) & STRANGE
        return SOURCES[(place >> SOURCE) & 3], self._ratios[ratio - 1] if ratio else None, place & (2**RATIO - 1)


@dataclass(frozen=True)
class Responses:
    """Sorted by place."""

    place_R: np.ndarray  # int64
    begin_R: np.ndarray  # int64, of its tokens
    length_R: np.ndarray  # int32
    token_T: np.ndarray  # int32
    begin_Q: np.ndarray  # int64, of a question's prompt
    length_Q: np.ndarray  # int32
    prompt_P: np.ndarray  # int32
    empty: int  # responses that were set aside

    def tokens(self, response: int) -> array:
        begin = self.begin_R[response]
        return array("i", self.token_T[begin : begin + self.length_R[response]].tobytes())

    def prompt(self, question: int) -> np.ndarray:
        begin = self.begin_Q[question]
        return self.prompt_P[begin : begin + self.length_Q[question]]


def response_groups(
    refs: Sequence[Ref], responses: Artifact, verdicts: Artifact | None, ratios: list[float], coverage: str,
    only: int | None = None,
) -> tuple[ResponseGroups, int]:  # fmt: skip
    """Groups of every question at the stages that train on it, and how many responses were set aside as empty.

    `only`: see `ResponseGroups`.
    """
    numbers = {ref.question_id: number for number, ref in enumerate(refs)}
    told = _responses(numbers, responses, ratios)
    scores_R = _scores(numbers, verdicts, ratios, told.place_R)
    return ResponseGroups(refs, told, scores_R, ratios, coverage == "full", only), told.empty


def _responses(numbers: dict[str, int], responses: Artifact, ratios: list[float]) -> Responses:
    empty, written = 0, 0
    places, lengths, tokens = [np.empty(0, np.int64)], [np.empty(0, np.int32)], [np.empty(0, np.int32)]
    prompts, prompt_Q = [np.empty(0, np.int32)], np.zeros((3, len(numbers)), np.int64)  # begin, length, mark
    for table in responses.batches("responses", [*COLUMNS, "prompt_token_ids", "response_token_ids"]):
        said = pc.greater(pc.fill_null(pc.list_value_length(table["response_token_ids"]), 0), 0)
        empty += len(table) - pc.sum(said).as_py() if len(table) else 0
        place, rows = _places(table.filter(said), numbers, ratios)
        length, token = _lists(rows["response_token_ids"])
        for parts, part in ((places, place), (lengths, length), (tokens, token)):
            parts.append(part)
        question, first = np.unique(place >> QUESTION, return_index=True)
        new = prompt_Q[1, question] == 0
        _same_prompts(rows.take(pa.array(first[~new])), prompt_Q[2, question[~new]])
        length, prompt = _lists(rows["prompt_token_ids"].take(pa.array(first[new])))
        prompt_Q[:, question[new]] = written + np.cumsum(length) - length, length, _marks(length, prompt)
        prompts.append(prompt)
        written += len(prompt)
    place, length = np.concatenate(places), np.concatenate(lengths)
    order, begin = np.argsort(place, kind="stable"), np.cumsum(length, dtype=np.int64) - length
    return Responses(
        place[order], begin[order], length[order], np.concatenate(tokens), prompt_Q[0], prompt_Q[1],
        np.concatenate(prompts), empty,
    )  # fmt: skip


def _marks(length: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """int64: a hash of each list, of this process."""
    ends = np.cumsum(length, dtype=np.int64)
    return np.array([hash(tokens[end - n : end].tobytes()) for n, end in zip(length, ends, strict=True)], np.int64)


def _same_prompts(rows: pa.Table, mark_Q: np.ndarray) -> None:
    """Raises MastersError unless each row's prompt is the one whose mark its question has already."""
    other = np.flatnonzero(_marks(*_lists(rows["prompt_token_ids"])) != mark_Q)
    if len(other):
        raise MastersError(
            f"question {rows['question_id'][int(other[0])].as_py()}: its responses lie behind different prompts ("
            f"{len(other)} such questions): teacher and student must have the same chat template and processor settings"
        )


def _scores(numbers: dict[str, int], verdicts: Artifact | None, ratios: list[float], place_R: np.ndarray) -> np.ndarray:
    """float64 [R]: the verdict on each response, NaN where there is none."""
    found = np.full(len(place_R), np.nan)
    for table in verdicts.batches("verdicts", [*COLUMNS, "score"]) if verdicts else ():
        place, rows = _places(table, numbers, ratios)
        score = pc.fill_null(rows["score"], np.nan).to_numpy()
        at = np.minimum(np.searchsorted(place_R, place), max(0, len(place_R) - 1))
        there = place_R[at] == place if len(place_R) else np.zeros(len(place), bool)
        found[at[there]] = score[there]
    return found


def _places(table: pa.Table, numbers: dict[str, int], ratios: list[float]) -> tuple[np.ndarray, pa.Table]:
    """The place of each row, int64, and the rows: those of questions that are trained on."""
    # one dictionary for all tables: Arrow's index_in would hash every id of the run again for each of them
    question = np.array([numbers.get(one, -1) for one in table["question_id"].to_pylist()], np.int64)
    table, question = table.filter(pa.array(question >= 0)), question[question >= 0]
    source = pc.index_in(table["source"], value_set=pa.array(SOURCES)).to_numpy().astype(np.int64)
    of_stage = pc.add(pc.index_in(table["mask_ratio"], value_set=pa.array(ratios, pa.float64())), 1)
    strange = pc.fill_null(of_stage, STRANGE)
    ratio = pc.if_else(pc.is_null(table["mask_ratio"]), 0, strange).to_numpy().astype(np.int64)
    sample = table["sample"].to_numpy().astype(np.int64)
    return question << QUESTION | source << SOURCE | ratio << RATIO | sample, table


def _lists(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and values of lists, int32 both."""
    length = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    return length.astype(np.int32), pc.list_flatten(column).to_numpy().astype(np.int32)
