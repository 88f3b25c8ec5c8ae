"""What training leaves beside the weights: the tables `history`, a row a step, and `rewards`, a row a response.

Memory holds few rows: every rank writes its own, part by part, next to the checkpoints. A part is named after the
last step it knows; all ranks write before a checkpoint is saved, and a run that goes on from a checkpoint drops the
parts behind it. So each row is there once, however often a run was cut short.
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
PART_ROWS = 20_000  # in memory, at least those of a step
FILE_ROWS = 200_000
SHOWN = 3  # steps in an error
AGAIN = "train it again with --rebuild train"


class HistoryWriter:
    """The rows of one rank that are not written yet."""

    def __init__(self) -> None:
        self._rows: dict[str, list[dict]] = {table: [] for table in SCHEMAS}
        self._step: dict = {}
        self._ratio = 0.0

    @property
    def full(self) -> bool:
        return sum(map(len, self._rows.values())) >= PART_ROWS

    def begin(self, step: int, epoch: int, stage: int, ratio: float) -> None:
        """What follows is of this step; `ratio`: how much of its teacher is masked."""
        self._step, self._ratio = dict(step=step, epoch=epoch, stage=stage), ratio

    def responses(self, groups: list[Group], values: dict[str, list[float]]) -> None:
        """Rows of the groups' responses, in order; NaN becomes null."""
        keys = [(group.ref.question_id, *key) for group in groups for key in group.keys]
        for at, (question_id, source, mask_ratio, sample) in enumerate(keys if values else []):
            key = dict(question_id=question_id, source=source, mask_ratio=mask_ratio, sample=sample)
            found = {name: _known(column[at]) for name, column in values.items()}
            self._rows["rewards"].append(self._step | dict(teacher_ratio=self._ratio) | key | found)

    def end(self, questions: int, values: dict[str, float]) -> None:
        """The step's own row."""
        found = {name: _known(value) for name, value in values.items()}
        self._rows["history"].append(self._step | dict(mask_ratio=self._ratio, questions=questions) | found)

    def write(self, storage: Storage, prefix: str, rank: int) -> None:
        for table, rows in self._rows.items():
            if rows:
                name = f"{prefix}/{table}-{self._step['step']:08d}-{rank:04d}.parquet"
                storage.write(name, tables.encode(rows, SCHEMAS[table]))
                rows.clear()


def drop_after(storage: Storage, prefix: str, step: int) -> None:
    """Remove the parts of steps that will be taken again."""
    for table in SCHEMAS:
        for name in _parts(storage, prefix, table):
            if int(name.rsplit("-", 2)[1]) > step:
                storage.remove(name)


def files(storage: Storage, prefix: str, table: str) -> Iterator[bytes]:
    """A table's parts joined to files of at least `FILE_ROWS` rows, by step; at least one file, be it empty."""
    held, written = [SCHEMAS[table].empty_table()], 0
    for name in _parts(storage, prefix, table):
        held.append(tables.read(storage, name))
        if sum(part.num_rows for part in held) >= FILE_ROWS:
            yield tables.encode_table(pa.concat_tables(held))
            held, written = [SCHEMAS[table].empty_table()], written + 1
    if len(held) > 1 or not written:
        yield tables.encode_table(pa.concat_tables(held))


def steps(storage: Storage, prefix: str) -> Iterator[dict]:
    """Rows of `history` that are written already, in order of steps."""
    for name in _parts(storage, prefix, "history"):
        yield from tables.read(storage, name).to_pylist()


class HistoryCheck:
    """What is in the tables, counted: a part that a store lost, or a run wrote twice, is seen."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._questions = self._answered = self._rows = self._keys = 0

    def count(self, table: str, content: bytes) -> None:
        """One of the table's `files`."""
        if table == "history":
            found = tables.decode(content, ["step", "questions"]).to_pydict()
            self._steps += found["step"]
            self._questions += sum(found["questions"])
            return
        keys = ["step", *(name for name, _ in tables.RESPONSE_KEY)]
        found = tables.decode(content, keys)
        self._rows += found.num_rows
        self._keys += found.group_by(keys).aggregate([]).num_rows
        self._answered += found.group_by(["step", "question_id"]).aggregate([]).num_rows

    def check(self, steps: int, rewarded: bool, before: int = 0) -> None:
        """Each of `steps` steps is there once; `rewarded`: and so are the responses of all its questions.

        `before`: the steps of the round that another training took. Raises ArtifactError.
        """
        expected, times = range(before + 1, before + steps + 1), Counter(self._steps)
        if wrong := [step for step in sorted({*expected, *times}) if times[step] != (step in expected)]:
            raise ArtifactError(f"history: expected each of {steps} steps once, {_listed(wrong, times)}; {AGAIN}")
        if self._rows != self._keys:
            raise ArtifactError(f"rewards: {self._rows - self._keys} responses are there more than once; {AGAIN}")
        if rewarded and self._answered != self._questions:
            raise ArtifactError(
                f"rewards: expected the responses of {self._questions} questions in {steps} steps, found those of "
                f"{self._answered}; {AGAIN}"
            )


def _listed(wrong: list[int], times: Counter) -> str:
    shown = ", ".join(f"step {step} {times[step]} times" for step in wrong[:SHOWN])
    return f"found {shown}" + (f" and {len(wrong) - SHOWN} more at fault" if len(wrong) > SHOWN else "")


def parts(storage: Storage, prefix: str) -> list[str]:
    """Names of all parts of all tables, sorted."""
    return sorted(name for table in SCHEMAS for name in _parts(storage, prefix, table))


def _parts(storage: Storage, prefix: str, table: str) -> list[str]:
    return [n for n in storage.names(prefix) if n.startswith(f"{prefix}/{table}-")]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
