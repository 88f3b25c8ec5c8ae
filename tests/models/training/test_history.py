"""Rows of a training that was cut short: each is in the tables once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from masters.common.errors import ArtifactError
from masters.data.question_shards import Ref
from masters.models.training import history
from masters.models.training.groups import Group
from masters.models.training.history import HistoryWriter
from masters.store import tables
from masters.store.storage import Storage

RANKS = 2


class Cut(Exception):
    """The process is gone."""


def attempt(storage: Storage, start: int, steps: int, every: int, dies_at: tuple[int, int] | None) -> int:
    """Steps as the trainer takes them, from a checkpoint on. Returns the newest checkpoint.

    `dies_at`: in this step, after so many ranks have written their rows.
    """
    history.drop_after(storage, "c", start)
    ledgers, saved = [HistoryWriter() for _ in range(RANKS)], start
    for step in range(start + 1, steps + 1):
        for rank, ledger in enumerate(ledgers):
            ledger.begin(step, 0, 0, 0.2)
            group = Group(Ref("", f"q{step}-{rank}", 0, 0), 0, None, [[1]], np.array([1.0]), [("teacher", 0.2, 0)])
            ledger.responses([group], {"divergence": [step / 10], "reward": [float("nan")]})
        ledgers[0].end(RANKS, {"loss": float(step)})
        due = step % every == 0 or step == steps
        for rank, ledger in enumerate(ledgers):
            if dies_at == (step, rank):
                raise Cut(saved)
            if due:
                ledger.write(storage, "c", rank)
        saved = step if due else saved
    return saved


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    return (Storage(str(tmp_path_factory.mktemp("store"))) for _ in iter(int, 1))


@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(0, RANKS - 1)), max_size=4),
)
def test_each_row_is_there_once_however_often_it_was_cut_short(stores, steps: int, cuts: list[tuple]) -> None:
    storage, saved = next(stores), 0
    for every, step, rank in cuts:  # another rhythm of checkpoints each time
        try:
            saved = attempt(storage, saved, steps, every, (step, rank))
        except Cut as cut:
            saved = cut.args[0]
    if saved < steps:
        attempt(storage, saved, steps, 2, None)
    found = {
        table: [row for part in history.files(storage, "c", table) for row in tables.decode(part).to_pylist()]
        for table in history.SCHEMAS
    }
    assert [row["step"] for row in found["history"]] == list(range(1, steps + 1))
    keys = [row["question_id"] for row in found["rewards"]]
    assert sorted(keys) == sorted(f"q{step}-{rank}" for step in range(1, steps + 1) for rank in range(RANKS))
    assert all(row["reward"] is None and row["divergence"] == row["step"] / 10 for row in found["rewards"])


def test_a_table_without_rows_is_an_empty_file(tmp_path: Path) -> None:
    (content,) = history.files(Storage(str(tmp_path)), "c", "rewards")
    assert tables.decode(content).num_rows == 0


def test_parts_are_joined_to_files_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "FILE_ROWS", 6)
    storage = Storage(str(tmp_path))
    attempt(storage, 0, 10, 1, None)
    counts = [tables.decode(part).num_rows for part in history.files(storage, "c", "rewards")]
    assert counts == [6, 6, 6, 2]


def census(storage: Storage) -> history.HistoryCheck:
    counted = history.HistoryCheck()
    for table in history.SCHEMAS:
        for content in history.files(storage, "c", table):
            counted.count(table, content)
    return counted


def again(storage: Storage, table: str) -> None:
    """A part written a second time under a later step's name."""
    part = next(name for name in history.parts(storage, "c") if f"/{table}-" in name)
    storage.write(f"c/{table}-00000099-0000.parquet", storage.read(part))


FAULTS: dict[str, tuple[Callable[[Storage], object], str]] = {
    "a part of history is gone": (
        lambda storage: storage.remove("c/history-00000004-0000.parquet"),
        "each of 8 steps once, found step 3 0 times, step 4 0 times; train it again with --rebuild train",
    ),
    "a part of history is there twice": (lambda storage: again(storage, "history"), "step 1 2 times, step 2 2 times;"),
    "a rank's part of rewards is gone": (
        lambda storage: storage.remove("c/rewards-00000004-0001.parquet"), "16 questions in 8 steps, found those of 14"
    ),
    "a part of rewards is there twice": (lambda storage: again(storage, "rewards"), "2 responses are there more than"),
    "all of history is gone": (
        lambda storage: [storage.remove(n) for n in history.parts(storage, "c") if "/history-" in n],
        "step 1 0 times, step 2 0 times, step 3 0 times and 5 more at fault",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_tables_that_are_not_whole_are_refused(tmp_path: Path, name: str) -> None:
    storage = Storage(str(tmp_path))
    attempt(storage, 0, 8, 2, None)
    census(storage).check(8, rewarded=True)
    spoil, says = FAULTS[name]
    spoil(storage)
    with pytest.raises(ArtifactError, match=says):
        census(storage).check(8, rewarded=True)


def test_steps_more_or_fewer_than_were_taken_are_refused(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    attempt(storage, 0, 8, 2, None)
    for steps, says in ((7, "found step 8 1 times"), (9, "found step 9 0 times")):
        with pytest.raises(ArtifactError, match=says):
            census(storage).check(steps, rewarded=True)


def test_where_nothing_is_rewarded_history_alone_is_asked_for(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    attempt(storage, 0, 4, 2, None)
    for name in history.parts(storage, "c"):
        if "/rewards-" in name:
            storage.remove(name)
    census(storage).check(4, rewarded=False)
    with pytest.raises(ArtifactError, match="found those of 0"):
        census(storage).check(4, rewarded=True)
