"""The tables that training writes: `history`, one row for each step, and `rewards`, one row for each response.

Every rank writes its rows to part files beside the checkpoints, so that memory holds few. A part is named after its
last step. All ranks write before a checkpoint is saved, and a run that resumes from a checkpoint removes later parts.
So each row exists once, however often a run was interrupted. Imports no torch.
"""

import math
from collections import Counter
from collections.abc import Iterator

import pyarrow as pa

from masters.common.errors import ArtifactError
from masters.models.training.groups import Group
from masters.store import tables
from masters.store.storage import Storage

SCHEMAS = {"history": tables.HISTORY, "rewards": tables.REWARDS}
PART_ROWS = 20_000  # rows in memory after which a part is written; at least those of one step
FILE_ROWS = 200_000  # rows of a table's file in the artifact, at least
MAX_LISTED = 3  # steps in an error message
ADVICE = "train it again with --rebuild train"


class HistoryWriter:
    """Collects the rows of one rank and writes them to part files."""

    def __init__(self) -> None:
        self._rows: dict[str, list[dict]] = {table: [] for table in SCHEMAS}
        self._step: dict = {}
        self._ratio = 0.0

    @property
    def is_full(self) -> bool:
        return sum(map(len, self._rows.values())) >= PART_ROWS

    def begin_step(self, step: int, epoch: int, stage: int, ratio: float) -> None:
        """Start a step: the rows added next belong to it. `ratio`: the teacher's mask ratio."""
        self._step, self._ratio = dict(step=step, epoch=epoch, stage=stage), ratio

    def add_responses(self, groups: list[Group], columns: dict[str, list[float]]) -> None:
        """Add rows of `rewards` for the groups' responses, in order, unless there are no columns. NaN becomes null."""
        if not columns:
            return
        step = self._step | dict(teacher_ratio=self._ratio)
        keys = [(group.ref.question_id, *key) for group in groups for key in group.keys]
        for row, (question_id, source, mask_ratio, sample) in enumerate(keys):
            key = dict(question_id=question_id, source=source, mask_ratio=mask_ratio, sample=sample)
            values = {name: _null_if_nan(column[row]) for name, column in columns.items()}
            self._rows["rewards"].append(step | key | values)

    def end_step(self, questions: int, means: dict[str, float]) -> None:
        """Add the step's row of `history`. NaN becomes null."""
        values = {name: _null_if_nan(value) for name, value in means.items()}
        self._rows["history"].append(self._step | dict(mask_ratio=self._ratio, questions=questions) | values)

    def write(self, storage: Storage, prefix: str, rank: int) -> None:
        """Write the collected rows to a part file of each table that has some."""
        for table, rows in self._rows.items():
            if rows:
                name = f"{prefix}/{table}-{self._step['step']:08d}-{rank:04d}.parquet"
                storage.write(name, tables.encode(rows, SCHEMAS[table]))
                rows.clear()


def drop_after(storage: Storage, prefix: str, step: int) -> None:
    """Remove the parts of steps after this one, which will be repeated."""
    for table in SCHEMAS:
        for name in _parts(storage, prefix, table):
            if int(name.rsplit("-", 2)[1]) > step:
                storage.remove(name)


def files(storage: Storage, prefix: str, table: str) -> Iterator[bytes]:
    """Join a table's parts, in order of steps, into files of at least `FILE_ROWS` rows, the last one excepted.

    There is at least one file, which may have no rows.
    """
    empty = SCHEMAS[table].empty_table()
    joined, written = [empty], 0
    for name in _parts(storage, prefix, table):
        joined.append(tables.read(storage, name))
        if sum(part.num_rows for part in joined) >= FILE_ROWS:
            yield tables.encode_table(pa.concat_tables(joined))
            joined, written = [empty], written + 1
    if len(joined) > 1 or not written:
        yield tables.encode_table(pa.concat_tables(joined))


def steps(storage: Storage, prefix: str) -> Iterator[dict]:
    """Return the rows of `history` that are already written, in order of steps."""
    for name in _parts(storage, prefix, "history"):
        yield from tables.read(storage, name).to_pylist()


class HistoryCheck:
    """Counts the rows of both tables, to detect a part that the store lost or that was written twice."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._questions = self._answered = self._rows = self._keys = 0

    def add_file(self, table: str, content: bytes) -> None:
        """Count the rows of one of the table's `files`."""
        if table == "history":
            columns = tables.decode(content, ["step", "questions"]).to_pydict()
            self._steps += columns["step"]
            self._questions += sum(columns["questions"])
            return
        keys = ["step", *(name for name, _ in tables.RESPONSE_KEY)]
        rewards = tables.decode(content, keys)
        self._rows += rewards.num_rows
        self._keys += rewards.group_by(keys).aggregate([]).num_rows
        self._answered += rewards.group_by(["step", "question_id"]).aggregate([]).num_rows

    def check(self, steps: int, rewarded: bool, before: int = 0) -> None:
        """Raise ArtifactError unless each step has one row, and if `rewarded`, the responses of all its questions.

        `steps`: number of steps of this training; `before`: number of the round's steps before it.
        """
        expected, times = range(before + 1, before + steps + 1), Counter(self._steps)
        if wrong := [step for step in sorted({*expected, *times}) if times[step] != (step in expected)]:
            raise ArtifactError(f"history: expected each of {steps} steps once, {_listed(wrong, times)}; {ADVICE}")
        if self._rows != self._keys:
            raise ArtifactError(f"rewards: {self._rows - self._keys} responses have more than one row; {ADVICE}")
        if rewarded and self._answered != self._questions:
            raise ArtifactError(
                f"rewards: expected the responses of {self._questions} questions in {steps} steps, found those of "
                f"{self._answered}; {ADVICE}"
            )


def _listed(wrong: list[int], times: Counter) -> str:
    shown = ", ".join(f"step {step} {times[step]} times" for step in wrong[:MAX_LISTED])
    return f"found {shown}" + (f" and {len(wrong) - MAX_LISTED} more at fault" if len(wrong) > MAX_LISTED else "")


def parts(storage: Storage, prefix: str) -> list[str]:
    """Return the names of all parts of all tables, sorted."""
    return sorted(name for table in SCHEMAS for name in _parts(storage, prefix, table))


def _parts(storage: Storage, prefix: str, table: str) -> list[str]:
    return [n for n in storage.names(prefix) if n.startswith(f"{prefix}/{table}-")]


def _null_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
