"""Each row of an interrupted training is in the tables exactly once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from masters.common.errors import ArtifactError
from masters.data.question_shards import QuestionRef
from masters.models.training import history
from masters.models.training.groups import Group
from masters.models.training.history import HistoryWriter
from masters.store import tables
from masters.store.storage import Storage

RANKS = 2


class Interrupted(Exception):
    """The process ended; the argument is its newest checkpoint."""


def write_steps(
    storage: Storage, start: int, steps: int, interval: int, interrupted_at: tuple[int, int] | None = None
) -> int:
    """Write the rows of steps like a trainer that starts from checkpoint `start`. Returns the newest checkpoint.

    `interrupted_at`: a step, and how many ranks write their rows in it before the interruption.
    """
    history.drop_after(storage, "c", start)
    writers, saved = [HistoryWriter() for _ in range(RANKS)], start
    for step in range(start + 1, steps + 1):
        for rank, writer in enumerate(writers):
            writer.begin_step(step, 0, 0, 0.2)
            ref, keys = QuestionRef("", f"q{step}-{rank}", 0, 0), [("teacher", 0.2, 0)]
            group = Group(ref, 0, None, [[1]], np.array([1.0]), np.array([True]), keys)
            writer.add_responses([group], {"divergence": [step / 10], "reward": [float("nan")]})
        writers[0].end_step(RANKS, {"loss": float(step)})
        saves = step % interval == 0 or step == steps
        for rank, writer in enumerate(writers):
            if interrupted_at == (step, rank):
                raise Interrupted(saved)
            if saves:
                writer.write(storage, "c", rank)
        saved = step if saves else saved
    return saved


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    return (Storage(str(tmp_path_factory.mktemp("store"))) for _ in iter(int, 1))


@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(0, RANKS - 1)), max_size=4),
)
def test_each_row_exists_once_however_often_training_was_interrupted(
    stores, steps: int, interruptions: list[tuple]
) -> None:
    storage, saved = next(stores), 0
    for interval, step, rank in interruptions:  # with another interval between checkpoints each time
        try:
            saved = write_steps(storage, saved, steps, interval, (step, rank))
        except Interrupted as interruption:
            saved = interruption.args[0]
    if saved < steps:
        write_steps(storage, saved, steps, 2)
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
    write_steps(storage, 0, 10, 1)
    counts = [tables.decode(part).num_rows for part in history.files(storage, "c", "rewards")]
    assert counts == [6, 6, 6, 2]


def check_of(storage: Storage) -> history.HistoryCheck:
    check = history.HistoryCheck()
    for table in history.SCHEMAS:
        for content in history.files(storage, "c", table):
            check.add_file(table, content)
    return check


def write_again(storage: Storage, table: str) -> None:
    """Write a part a second time under a later step's name."""
    part = next(name for name in history.parts(storage, "c") if f"/{table}-" in name)
    storage.write(f"c/{table}-00000099-0000.parquet", storage.read(part))


FAULTS: dict[str, tuple[Callable[[Storage], object], str]] = {
    "a part of history is gone": (
        lambda storage: storage.remove("c/history-00000004-0000.parquet"),
        "each of 8 steps once, found step 3 0 times, step 4 0 times; train it again with --rebuild train",
    ),
    "a part of history is there twice": (
        lambda storage: write_again(storage, "history"),
        "step 1 2 times, step 2 2 times;",
    ),
    "a rank's part of rewards is gone": (
        lambda storage: storage.remove("c/rewards-00000004-0001.parquet"),
        "16 questions in 8 steps, found those of 14",
    ),
    "a part of rewards is there twice": (lambda storage: write_again(storage, "rewards"), "2 responses have more than"),
    "all of history is gone": (
        lambda storage: [storage.remove(n) for n in history.parts(storage, "c") if "/history-" in n],
        "step 1 0 times, step 2 0 times, step 3 0 times and 5 more at fault",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_tables_with_missing_or_repeated_rows_are_refused(tmp_path: Path, name: str) -> None:
    storage = Storage(str(tmp_path))
    write_steps(storage, 0, 8, 2)
    check_of(storage).check(8, rewarded=True)
    damage, message = FAULTS[name]
    damage(storage)
    with pytest.raises(ArtifactError, match=message):
        check_of(storage).check(8, rewarded=True)


def test_another_number_of_steps_is_refused(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    write_steps(storage, 0, 8, 2)
    for steps, message in ((7, "found step 8 1 times"), (9, "found step 9 0 times")):
        with pytest.raises(ArtifactError, match=message):
            check_of(storage).check(steps, rewarded=True)


def test_without_rewards_only_history_is_checked(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    write_steps(storage, 0, 4, 2)
    for name in history.parts(storage, "c"):
        if "/rewards-" in name:
            storage.remove(name)
    check_of(storage).check(4, rewarded=False)
    with pytest.raises(ArtifactError, match="found those of 0"):
        check_of(storage).check(4, rewarded=True)
