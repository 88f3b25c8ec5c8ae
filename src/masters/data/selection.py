"""First pass over a source: reject rows, and select questions within the limits.

The first of two passes validates every row and keeps eight bytes for each: a mark on the rows to take. The second pass
reads the marked rows again and writes them (`question_table`), so memory does not grow with the images.
"""

import heapq
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field

import pyarrow as pa

from masters.common.errors import InputError
from masters.common.hashing import digest, to_unit_interval
from masters.config import Config
from masters.data.sources import Source
from masters.data.validation import RejectedRow, RowError, parse_row
from masters.store import tables

REJECTED_ROWS = 10_000  # a file
SOURCE_CHANGED = "the data source changed while it was read; run again when nothing writes to it"

QuestionKey = tuple[str, str]  # (question_id, question_digest)


@dataclass
class Selection:
    """The result of the first pass.

    `marks`: for every row of the source its mark, 0 if it is not taken. `splits`: number of selected rows by split.
    `known`: number of known training questions, which are left out. `kinds` and `examples`: number of rejected rows and
    the first of them, by kind of rejection.
    """

    marks: array = field(default_factory=lambda: array("Q"))
    splits: Counter[str] = field(default_factory=Counter)
    known: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    examples: dict[str, RejectedRow] = field(default_factory=dict)

    @property
    def selected(self) -> int:
        return self.splits.total()

    @property
    def rejected(self) -> int:
        return self.kinds.total()


def select_rows(
    rows: Iterator[dict | RejectedRow],
    limits: dict[str, int | None],
    write: Callable[[str, list[dict], pa.Schema], None],
    known: Set[QuestionKey] = frozenset(),
) -> Selection:
    """Write the rejected rows, and mark the rows to take: in each split those of the smallest selection key.

    A row's key depends on that row alone, so additional rows never reshuffle the choice.
    """
    selection, rejected, files = Selection(), [], 0
    best: dict[str, list[tuple[int, int]]] = {split: [] for split in limits}  # heaps of (-selection key, position)
    for position, row in enumerate(rows):
        selection.marks.append(0)
        if isinstance(row, RejectedRow):
            selection.kinds[row.kind] += 1
            selection.examples.setdefault(row.kind, row)
            rejected.append(dict(id=row.id, reason=row.reason))
            if len(rejected) == REJECTED_ROWS:
                write(f"rejected/{files:04d}.parquet", rejected, tables.REJECTED)
                rejected, files = [], files + 1
            continue
        split = row["split"]
        if split == "train" and (row["question_id"], row["question_digest"]) in known:
            selection.known += 1
            continue
        selection.marks[position] = row_mark(row)
        selection.splits[split] += 1
        if (limit := limits[split]) is not None:
            heapq.heappush(best[split], (-selection_key(row), position))
            if len(best[split]) > limit:
                selection.marks[heapq.heappop(best[split])[1]] = 0
                selection.splits[split] -= 1
    if rejected or not files:  # the table exists even if nothing was rejected
        write(f"rejected/{files:04d}.parquet", rejected, tables.REJECTED)
    return selection


def selection_key(row: dict) -> int:
    return int(digest((row["question_id"] + row["question_digest"]).encode()), 16)


def row_mark(row: dict) -> int:
    """Return 64 bits of the question's digest, never 0, by which the second pass recognizes the row."""
    return int(row["question_digest"][:16], 16) | 1


def read_selected(source: Source, marks: array) -> Iterator[dict]:
    """Read the marked rows again. Raises InputError if the source has changed since the first pass."""
    changed, count = InputError(SOURCE_CHANGED), 0
    for position, raw_row in enumerate(source.rows()):
        count += 1
        if position >= len(marks):
            raise changed
        if not marks[position]:
            continue
        try:
            row = parse_row(raw_row)
        except (RowError, TypeError):  # TypeError: a field has another type now
            raise changed from None
        if row_mark(row) != marks[position]:
            raise changed
        yield row
    if count != len(marks):
        raise changed


def assign_validation(row: dict, share: float) -> dict:
    """Move a training row to the split "validation" if its image belongs to this share of the training images.

    A hash of the image decides: no image is both trained and validated on, and additional rows move no other row.
    """
    is_validation = row["split"] == "train" and _validation_hash(row["image_digest"]) < share
    return row | dict(split="validation") if is_validation else row


def _validation_hash(image_digest: str) -> float:
    return to_unit_interval(digest(f"validation {image_digest}".encode()))


def check_validation(splits: Counter, selection: Selection, config: Config) -> None:
    """Raise InputError if no training or no validation question is left."""
    if splits["validation"] and (splits["train"] or selection.known):
        return
    raise InputError(
        f"data.validation_share = {config.data.validation_share} leaves {splits['train']} training and "
        f"{splits['validation']} validation questions: expected some of both; choose another share or add images"
    )


def check_selection(selection: Selection, config: Config, rejected_uri: str) -> None:
    """Raise InputError if too many rows were rejected, or if a split is empty."""
    rows, limit = len(selection.marks), config.data.max_rejected_share
    reasons = "; ".join(
        f"{count} x {selection.examples[kind].reason}, e.g. {selection.examples[kind].id}"
        for kind, count in selection.kinds.most_common(3)
    )
    if selection.rejected > limit * rows:
        raise InputError(
            f"source {config.data.source}: {selection.rejected} of {rows} rows ({selection.rejected / rows:.1%}) "
            f"rejected, more than data.max_rejected_share ({limit:.1%}): {reasons}; all of them: {rejected_uri}"
        )
    for split, name in (("train", "training"), ("test", "evaluation")):
        if not selection.splits[split] and not (split == "train" and selection.known):
            hint = f"; rejected: {reasons}" if reasons else ""
            raise InputError(
                f'source {config.data.source}: no row of {rows} is left for {name} (split "{split}"){hint}'
            )
