"""Training groups (a question with its responses and their verdicts) and the order of optimizer steps. No torch.

Responses are held as columns, sorted by question, which take 37 bytes per response and 4 per token; a `Group` is made
when it is read.

Shapes: R non-empty responses of the questions that are trained on, T their tokens, Q questions, G groups.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute

from masters.common.errors import MastersError
from masters.config.fields import Truncated
from masters.config.mask_schedule import mask_stage_of
from masters.data.question_shards import QuestionRef
from masters.store import tables
from masters.store.artifacts import Artifact

Key = tuple[str, float | None, int]  # source, mask ratio (None for the student), sample

pc: Any = pyarrow.compute  # type checkers do not see its functions, which are made at import
SOURCES = ("teacher", "student")  # in the order of a group's responses
NO_STAGE = -1  # mask stage of the student's responses, which belong to all stages
RESPONSE_COLUMNS = ["question_id", "source", "mask_ratio", "sample"]
# the same key in integers: index of the question, index into SOURCES, mask stage
KEY_SCHEMA = pa.schema(dict(question=pa.int32(), source=pa.int32(), stage=pa.int32(), sample=pa.int32()))


@dataclass(frozen=True)
class Group:
    """A question at one mask stage."""

    ref: QuestionRef
    stage: int
    prompt: np.ndarray | None  # token ids that the engine saw, int32; None for labels
    responses: Sequence[Sequence[int]]  # token ids
    scores: np.ndarray  # float64, NaN for a response without a verdict
    is_trained: np.ndarray  # bool, whether the response adds to the loss; False for a masked one
    keys: list[Key]  # where each response comes from


@dataclass(frozen=True)
class Step:
    """One optimizer step. `groups`: indices of its groups."""

    stage: int
    epoch: int
    groups: tuple[int, ...]


def label_groups(
    refs: list[QuestionRef], answers: dict[str, list[int]], ratios: list[float], coverage: str
) -> list[Group]:
    """Make groups whose only response is the label. `answers`: the label's tokens, end token included, by question."""
    return [
        Group(ref, stage, None, [answers[ref.question_id]], np.array([np.nan]), np.array([True]), [("label", None, 0)])
        for ref in refs
        for stage in _stages_of(ref, len(ratios), coverage)
    ]


def plan_steps(groups: Sequence[Group], stages: int, epochs: int, questions_per_step: int, seed: int) -> list[Step]:
    """Divide groups into steps: mask stage by mask stage, then epoch by epoch, each shuffled by the seed.

    No step has groups of two stages or epochs.
    """
    steps, groups_of_stage = [], [[] for _ in range(stages)]
    for number, group in enumerate(groups):
        groups_of_stage[group.stage].append(number)
    for stage, members in enumerate(groups_of_stage):
        for epoch in range(epochs):
            shuffled = members.copy()
            random.Random(f"{seed}/{stage}/{epoch}").shuffle(shuffled)
            steps += [
                Step(stage, epoch, tuple(shuffled[begin : begin + questions_per_step]))
                for begin in range(0, len(shuffled), questions_per_step)
            ]
    return steps


def response_groups(
    refs: Sequence[QuestionRef],
    responses: Artifact,
    verdicts: Artifact | None,
    ratios: list[float],
    coverage: str,
    only_stage: int | None = None,
    truncated: Truncated = "mask",
) -> tuple["ResponseGroups", int]:
    """Return the groups of questions that have responses, and the number of empty responses, which are left out.

    Groups are in the order of `refs`, then of mask stages; `only_stage` leaves out the other stages. `truncated`: a
    response that was cut at the length limit stays in its group without a loss ("mask"), is left out ("drop"), or is
    treated like all others ("keep").
    Raises MastersError if the responses to a question follow different prompts.
    """
    columns, empty = _read_columns(refs, responses, verdicts, ratios, truncated)
    return ResponseGroups(refs, columns, ratios, coverage, only_stage), empty


@dataclass(frozen=True)
class ResponseColumns:
    """Responses sorted by question, source, mask stage and sample."""

    question_R: np.ndarray
    source_R: np.ndarray  # index into SOURCES
    stage_R: np.ndarray  # NO_STAGE for the student's
    sample_R: np.ndarray
    score_R: np.ndarray  # NaN where there is no verdict
    is_trained_R: np.ndarray  # bool
    first_token_R: np.ndarray  # index into T
    length_R: np.ndarray
    token_T: np.ndarray
    prompt_Q: list[np.ndarray | None]


class ResponseGroups(Sequence[Group]):
    """The groups of a table of responses, each made when it is read."""

    def __init__(
        self,
        refs: Sequence[QuestionRef],
        columns: ResponseColumns,
        ratios: list[float],
        coverage: str,
        only_stage: int | None = None,
    ) -> None:
        self._refs, self._columns, self._ratios = refs, columns, ratios
        self._first_row_Q = np.searchsorted(columns.question_R, np.arange(len(refs) + 1))
        nonempty = (
            (question, stage)
            for question, ref in enumerate(refs)
            for stage in _stages_of(ref, len(ratios), coverage)
            if only_stage in (None, stage) and len(self._rows(question, stage))
        )
        self._question_and_stage_G2 = np.fromiter(nonempty, np.dtype((np.int32, 2)))

    def __len__(self) -> int:
        return len(self._question_and_stage_G2)

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> list[Group]: ...
    def __getitem__(self, index: int | slice) -> Group | list[Group]:
        if isinstance(index, slice):
            return [self[g] for g in range(len(self))[index]]
        question, stage = self._question_and_stage_G2[index].tolist()
        rows, columns = self._rows(question, stage), self._columns
        ends = columns.first_token_R[rows] + columns.length_R[rows]
        responses = [
            columns.token_T[first:end].tolist() for first, end in zip(columns.first_token_R[rows], ends, strict=True)
        ]
        return Group(
            ref=self._refs[question],
            stage=stage,
            prompt=columns.prompt_Q[question],
            responses=responses,
            scores=columns.score_R[rows],
            is_trained=columns.is_trained_R[rows],
            keys=[self._key(row) for row in rows],
        )

    def _rows(self, question: int, stage: int) -> np.ndarray:
        """Return the rows of the question's responses at this mask stage, the student's included."""
        rows = np.arange(self._first_row_Q[question], self._first_row_Q[question + 1])
        stages = self._columns.stage_R[rows]
        return rows[(stages == stage) | (stages == NO_STAGE)]

    def _key(self, row: int) -> Key:
        columns, stage = self._columns, self._columns.stage_R[row]
        ratio = None if stage == NO_STAGE else self._ratios[stage]
        return SOURCES[columns.source_R[row]], ratio, int(columns.sample_R[row])


def _stages_of(ref: QuestionRef, stages: int, coverage: str) -> Sequence[int]:
    """Return the mask stages that train on a question."""
    return range(stages) if coverage == "full" else [mask_stage_of(ref.digest, stages)]


def _read_columns(
    refs: Sequence[QuestionRef],
    responses: Artifact,
    verdicts: Artifact | None,
    ratios: list[float],
    truncated: Truncated,
) -> tuple[ResponseColumns, int]:
    """Read both tables. Returns the columns, and the number of empty responses."""
    question_numbers = {ref.question_id: number for number, ref in enumerate(refs)}
    empty = 0
    prompt_Q: list[np.ndarray | None] = [None] * len(refs)
    keys = [KEY_SCHEMA.append(pa.field("is_trained", pa.bool_())).empty_table()]
    lengths, tokens = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
    token_columns = ["prompt_token_ids", "response_token_ids", "finish_reason"]
    for batch in responses.batches("responses", RESPONSE_COLUMNS + token_columns):
        has_tokens = pc.greater(pc.fill_null(pc.list_value_length(batch["response_token_ids"]), 0), 0)
        empty += pc.sum(pc.invert(has_tokens)).as_py() or 0
        is_kept = pc.and_not(has_tokens, _is_truncated(batch)) if truncated == "drop" else has_tokens
        batch_keys, rows = _integer_keys(batch.filter(is_kept), question_numbers, ratios)
        _add_prompts(prompt_Q, batch_keys["question"].to_numpy(), rows)
        batch_lengths, batch_tokens = _flatten(rows["response_token_ids"])
        is_trained = pc.or_(pc.invert(_is_truncated(rows)), truncated == "keep")
        keys.append(batch_keys.append_column("is_trained", is_trained))
        lengths.append(batch_lengths)
        tokens.append(batch_tokens)
    length_R, token_T = np.concatenate(lengths), np.concatenate(tokens)
    table = pa.concat_tables(keys)
    table = table.append_column("first_token", pa.array(np.cumsum(length_R, dtype=np.int64) - length_R))
    table = table.append_column("length", pa.array(length_R))
    table = _join_scores(table, verdicts, question_numbers, ratios)
    table = table.sort_by([(name, "ascending") for name in KEY_SCHEMA.names])
    columns = {f"{name}_R": table[name].to_numpy() for name in table.column_names}
    return ResponseColumns(**columns, token_T=token_T, prompt_Q=prompt_Q), empty


def _is_truncated(rows: pa.Table) -> pa.ChunkedArray:
    """Return whether each response was cut at the length limit."""
    return pc.fill_null(pc.equal(rows["finish_reason"], tables.TRUNCATED), False)


def _integer_keys(batch: pa.Table, question_numbers: dict[str, int], ratios: list[float]) -> tuple[pa.Table, pa.Table]:
    """Return the keys (`KEY_SCHEMA`) of the rows whose question and mask stage are trained on, and these rows."""
    # a dictionary for all batches: Arrow's index_in would hash every question id of the run again for each batch
    question = pa.array(
        [question_numbers.get(question_id) for question_id in batch["question_id"].to_pylist()], pa.int32()
    )
    stage = pc.index_in(batch["mask_ratio"], value_set=pa.array(ratios, pa.float64()))
    keys = pa.table(
        dict(
            question=question,
            source=pc.index_in(batch["source"], value_set=pa.array(SOURCES)),
            stage=pc.if_else(pc.is_null(batch["mask_ratio"]), pa.scalar(NO_STAGE, pa.int32()), stage),
            sample=batch["sample"].cast(pa.int32()),
        ),
        KEY_SCHEMA,
    )
    is_trained_on = pc.and_(pc.is_valid(keys["question"]), pc.is_valid(keys["stage"]))
    return keys.filter(is_trained_on), batch.filter(is_trained_on)


def _add_prompts(prompt_Q: list[np.ndarray | None], question_R: np.ndarray, rows: pa.Table) -> None:
    """Add prompts of questions that are new, and compare those of known ones. Raises MastersError if one differs."""
    questions, first_rows = np.unique(question_R, return_index=True)
    prompts = _split(*_flatten(rows["prompt_token_ids"].take(pa.array(first_rows))))
    differing = []
    for question, row, prompt in zip(questions, first_rows, prompts, strict=True):
        known = prompt_Q[question]
        if known is None:
            prompt_Q[question] = prompt.copy()  # a view would keep the whole batch in memory
        elif not np.array_equal(known, prompt):
            differing.append(rows["question_id"][int(row)].as_py())
    if differing:
        raise MastersError(
            f"question {differing[0]}: its responses follow different prompts ("
            f"{len(differing)} such questions): teacher and student must have the same chat template and processor "
            "settings"
        )


def _join_scores(
    table: pa.Table, verdicts: Artifact | None, question_numbers: dict[str, int], ratios: list[float]
) -> pa.Table:
    """Add the column `score` with the verdict on each response, NaN where there is none."""
    scores = [KEY_SCHEMA.append(pa.field("score", pa.float64())).empty_table()]
    for batch in verdicts.batches("verdicts", [*RESPONSE_COLUMNS, "score"]) if verdicts else ():
        keys, rows = _integer_keys(batch, question_numbers, ratios)
        scores.append(keys.append_column("score", rows["score"].cast(pa.float64())))
    joined = table.join(pa.concat_tables(scores), KEY_SCHEMA.names, join_type="left outer", use_threads=False)
    assert len(joined) == len(table), "the verdicts table has one row for each response"
    score = pc.fill_null(joined["score"], np.nan)
    return joined.set_column(joined.column_names.index("score"), "score", score)


def _flatten(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths and the values of a column of lists, both int32."""
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    return lengths.astype(np.int32), pc.list_flatten(column).to_numpy().astype(np.int32)


def _split(lengths: np.ndarray, values: np.ndarray) -> Iterator[np.ndarray]:
    """Return the lists that `_flatten` took apart, as views."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return (values[end - length : end] for length, end in zip(lengths, ends, strict=True))
