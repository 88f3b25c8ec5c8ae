"""First pass over a source: reject rows, select questions within the limits, and find them again.

The first of two passes judges every row and keeps eight bytes a row: which ones to take. The second reads those again
and writes them (`question_table`). So memory does not grow with the images.
"""

import heapq
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field

import pyarrow as pa

from masters.common.errors import InputError
from masters.common.hashing import digest, unit_interval
from masters.config import Config
from masters.data.sources import Source
from masters.data.validation import Reject, Rejected, reread
from masters.store import tables

REJECTED_ROWS = 10_000  # a file
CHANGED = "the data source changed while it was read; run again when nothing writes to it"

Question = tuple[str, str]  # id and digest


def with_validation(row: dict, share: float) -> dict:
    """The row, in split "validation" if its image belongs to this share of the training images.

    A hash of the image decides, so that no image is both trained and validated on, and more rows move none.
    """
    held = row["split"] == "train" and unit_interval(digest(f"validation {row['image_digest']}".encode())) < share
    return row | dict(split="validation") if held else row


@dataclass
class Selection:
    """The first pass: a mark for every row of the source (0: not taken), counts, an example id a kind of rejection."""

    marks: array = field(default_factory=lambda: array("Q"))
    splits: Counter = field(default_factory=Counter)  # of the rows taken
    known: int = 0  # training questions left out
    kinds: Counter = field(default_factory=Counter)
    examples: dict[str, Rejected] = field(default_factory=dict)

    @property
    def chosen(self) -> int:
        return self.splits.total()

    @property
    def rejected(self) -> int:
        return self.kinds.total()


def judge(
    rows: Iterator[dict | Rejected],
    limits: dict[str, int | None],
    write: Callable[[str, list[dict], pa.Schema], None],
    known: Set[Question] = frozenset(),
) -> Selection:
    """Look at every row, write the rejected, and mark the rows to take: per split, those of the smallest rank.

    A row's rank depends on it alone, so that more rows never reshuffle the choice.
    """
    judged, rejected, parts = Selection(), [], 0
    best: dict[str, list[tuple[int, int]]] = {split: [] for split in limits}  # heaps of (-rank, position)
    for position, row in enumerate(rows):
        judged.marks.append(0)
        if isinstance(row, Rejected):
            judged.kinds[row.kind] += 1
            judged.examples.setdefault(row.kind, row)
            rejected.append(dict(id=row.id, reason=row.reason))
            if len(rejected) == REJECTED_ROWS:
                write(f"rejected/{parts:04d}.parquet", rejected, tables.REJECTED)
                rejected, parts = [], parts + 1
            continue
        if row["split"] == "train" and (row["question_id"], row["question_digest"]) in known:
            judged.known += 1
            continue
        split, limit, heap = row["split"], limits[row["split"]], best[row["split"]]
        judged.marks[position] = mark(row)
        judged.splits[split] += 1
        if limit is not None:
            heapq.heappush(heap, (-selection_key(row), position))
            if len(heap) > limit:
                judged.marks[heapq.heappop(heap)[1]] = 0
                judged.splits[split] -= 1
    if rejected or not parts:  # the table is there even if nothing was rejected
        write(f"rejected/{parts:04d}.parquet", rejected, tables.REJECTED)
    return judged


def selection_key(row: dict) -> int:
    return int(digest((row["question_id"] + row["question_digest"]).encode()), 16)


def mark(row: dict) -> int:
    """64 bits of the question's digest, never 0: by it the second pass knows the row again."""
    return int(row["question_digest"][:16], 16) | 1


def chosen_rows(source: Source, marks: array) -> Iterator[dict]:
    """The marked rows, read again. Raises InputError if the source is no longer what was judged."""
    changed, count = InputError(CHANGED), 0
    for position, raw in enumerate(source.rows()):
        count += 1
        if position >= len(marks):
            raise changed
        if not marks[position]:
            continue
        try:
            row = reread(raw)
        except (Reject, TypeError):  # TypeError: a text became something else
            raise changed from None
        if mark(row) != marks[position]:
            raise changed
        yield row
    if count != len(marks):
        raise changed


def check_validation(splits: Counter, judged: Selection, config: Config) -> None:
    """Raises InputError if the training questions cannot be shared out."""
    if splits["validation"] and (splits["train"] or judged.known):
        return
    raise InputError(
        f"data.validation_share = {config.data.validation_share} leaves {splits['train']} training and "
        f"{splits['validation']} validation questions: expected some of both; take another share, or more images"
    )


def check_selection(judged: Selection, config: Config, where: str) -> None:
    """Raises InputError if too much was rejected, or if a split is empty."""
    rows, limit = len(judged.marks), config.data.max_rejected_share
    common = "; ".join(
        f"{count} x {judged.examples[kind].reason}, e.g. {judged.examples[kind].id}"
        for kind, count in judged.kinds.most_common(3)
    )
    if judged.rejected > limit * rows:
        raise InputError(
            f"source {config.data.source}: {judged.rejected} of {rows} rows ({judged.rejected / rows:.1%}) rejected, "
            f"more than data.max_rejected_share ({limit:.1%}): {common}; all of them: {where}"
        )
    for split, name in (("train", "training"), ("test", "evaluation")):
        if not judged.splits[split] and not (split == "train" and judged.known):
            hint = f"; rejected: {common}" if common else ""
            raise InputError(
                f'source {config.data.source}: no row of {rows} is left for {name} (split "{split}"){hint}'
            )
