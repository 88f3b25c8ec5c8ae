"""First pass over a source: reject rows, and select questions within the limits.

The first of two passes validates every row and keeps 17 bytes for each, with a mark on each selected row. The second
pass reads the marked rows again and writes them (`question_table`), so memory does not grow with the images.
"""

import heapq
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import pyarrow as pa

from masters.common.errors import InputError
from masters.common.hashing import digest, to_unit_interval
from masters.config import Config
from masters.data.row_validation import RejectedRow, RowError, parse_row, validate_rows
from masters.data.sources import Source
from masters.store import tables

REJECTED_FILE_ROWS = 10_000
MAX_REJECTIONS_IN_ERROR = 3  # kinds
SOURCE_CHANGED = "the data source changed while it was read; run again when nothing writes to it"

QuestionKey = tuple[str, str]  # (question_id, question_digest)
WriteTable = Callable[[str, list[dict], pa.Schema], None]  # (file name below the artifact's folder, rows, schema)


class Role(IntEnum):
    """The use of a row: not selected, one of the splits, or left out because an earlier run trained on it (known)."""

    UNUSED, TRAIN, TEST, VALIDATION, KNOWN = range(5)


@dataclass
class Selection:
    """The result of the first pass.

    For every row of the source, in order: `marks`, 0 if the row is not selected; `images`, 64 bits of its image's
    digest; `roles`, a `Role`. `rejections` and `examples`: number of rejected rows and the first of them, by kind of
    rejection. `changes`: number of accepted rows by what was changed in them. `categories`: number of accepted rows by
    category.
    """

    marks: array = field(default_factory=lambda: array("Q"))
    images: array = field(default_factory=lambda: array("Q"))
    roles: bytearray = field(default_factory=bytearray)
    rejections: Counter[str] = field(default_factory=Counter)
    examples: dict[str, RejectedRow] = field(default_factory=dict)
    changes: Counter[str] = field(default_factory=Counter)
    categories: Counter[str | None] = field(default_factory=Counter)

    @property
    def splits(self) -> dict[str, int]:
        """Number of selected rows by split: "train", "test", "validation"."""
        return {role.name.lower(): self.roles.count(role) for role in (Role.TRAIN, Role.TEST, Role.VALIDATION)}

    @property
    def selected(self) -> int:
        return sum(self.splits.values())

    @property
    def known(self) -> int:
        """Number of known training questions, which are left out."""
        return self.roles.count(Role.KNOWN)

    @property
    def rejected(self) -> int:
        return self.rejections.total()

    @property
    def leaked(self) -> np.ndarray:
        """Positions of the selected evaluation rows whose image is also in a training row, known ones included."""
        roles, images = np.frombuffer(self.roles, np.uint8), np.frombuffer(self.images, np.uint64)
        tests = np.flatnonzero(roles == Role.TEST)
        trained = images[np.isin(roles, (Role.TRAIN, Role.VALIDATION, Role.KNOWN))]
        return tests[np.isin(images[tests], trained)]

    @property
    def different_images(self) -> int:
        """Number of different images in accepted rows, also in those beyond the limits."""
        images = np.frombuffer(self.images, np.uint64)
        return len(np.unique(images[images != 0]))


def select_questions(
    config: Config,
    source: Source,
    write: WriteTable,
    special_tokens: tuple[str, ...] = (),
    known: Set[QuestionKey] = frozenset(),
) -> Selection:
    """Run the first pass over a source: write the rejected rows, and select questions within the limits."""
    changes: Counter[str] = Counter()
    limits = {"train": config.data.train_limit, "test": config.data.eval_limit}
    rows = validate_rows(source, special_tokens, changes)
    selection = select_rows(rows, limits, write, known, config.data.validation_share)
    selection.changes = changes
    return selection


def select_rows(
    rows: Iterator[dict | RejectedRow],
    limits: dict[str, int | None],
    write: WriteTable,
    known: Set[QuestionKey] = frozenset(),
    validation_share: float = 0.0,
) -> Selection:
    """Write the rejected rows, and mark the selected ones: in each split those with the smallest selection keys.

    A row's key depends on that row alone, so additional rows do not reshuffle the selection.
    """
    selection, rejected, files = Selection(), [], 0
    best: dict[str, list[tuple[int, int]]] = {split: [] for split in limits}  # heaps of (-selection key, position)
    for position, row in enumerate(rows):
        _append(selection, row)
        if isinstance(row, RejectedRow):
            rejected.append(dict(id=row.id, reason=row.reason))
            if len(rejected) == REJECTED_FILE_ROWS:
                write(f"rejected/{files:04d}.parquet", rejected, tables.REJECTED)
                rejected, files = [], files + 1
            continue
        split = row["split"]
        if split == "train" and (row["question_id"], row["question_digest"]) in known:
            selection.roles[position] = Role.KNOWN
            continue
        selection.marks[position] = row_mark(row)
        selection.roles[position] = Role[assign_validation(row, validation_share)["split"].upper()]
        if (limit := limits[split]) is not None:
            heapq.heappush(best[split], (-selection_key(row), position))
            if len(best[split]) > limit:
                worst = heapq.heappop(best[split])[1]
                selection.marks[worst], selection.roles[worst] = 0, Role.UNUSED
    if rejected or not files:  # the table exists even if nothing was rejected
        write(f"rejected/{files:04d}.parquet", rejected, tables.REJECTED)
    return selection


def _append(selection: Selection, row: dict | RejectedRow) -> None:
    """Add a row to the counts, without a mark."""
    selection.marks.append(0)
    selection.roles.append(Role.UNUSED)
    if isinstance(row, RejectedRow):
        selection.images.append(0)
        selection.rejections[row.kind] += 1
        selection.examples.setdefault(row.kind, row)
    else:
        selection.images.append(int(row["image_digest"][:16], 16) | 1)  # never 0
        selection.categories[row["category"]] += 1


def selection_key(row: dict) -> int:
    """Return a hash of the question's id and content."""
    return int(digest((row["question_id"] + row["question_digest"]).encode()), 16)


def row_mark(row: dict) -> int:
    """Return 64 bits of the question's digest, never 0, by which the second pass recognizes the row."""
    return int(row["question_digest"][:16], 16) | 1


def read_selected(source: Source, marks: array) -> Iterator[dict]:
    """Read the marked rows again. Raises InputError if the source has changed since the first pass."""
    count = 0
    for position, raw_row in enumerate(source.rows()):
        count += 1
        if position >= len(marks):
            raise InputError(SOURCE_CHANGED)
        if not marks[position]:
            continue
        try:
            row = parse_row(raw_row)
        except (RowError, TypeError):  # TypeError: a field has another type now
            raise InputError(SOURCE_CHANGED) from None
        if row_mark(row) != marks[position]:
            raise InputError(SOURCE_CHANGED)
        yield row
    if count != len(marks):
        raise InputError(SOURCE_CHANGED)


def assign_validation(row: dict, share: float) -> dict:
    """Move a training row to the split "validation" if its image belongs to this share of the training images.

    A hash of the image decides: no image is both trained and validated on, and additional rows move no other row.
    """
    image_hash = to_unit_interval(digest(f"validation {row['image_digest']}".encode()))
    is_validation = row["split"] == "train" and image_hash < share
    return row | dict(split="validation") if is_validation else row


def check_selection(selection: Selection, config: Config, rejected_uri: str | None = None) -> None:
    """Raise InputError if too many rows were rejected, a split is empty, or too many evaluation images are trained on.

    `rejected_uri`: where all rejected rows can be read.
    """
    rows, limit, reasons = len(selection.marks), config.data.max_rejected_share, describe_rejections(selection)
    if selection.rejected > limit * rows:
        table = f"; all of them: {rejected_uri}" if rejected_uri else ""
        raise InputError(
            f"source {config.data.source}: {selection.rejected} of {rows} rows ({selection.rejected / rows:.1%}) "
            f"rejected, more than data.max_rejected_share ({limit:.1%}): {reasons}{table}"
        )
    splits = selection.splits
    trained = splits["train"] + splits["validation"] + selection.known
    for count, split, name in ((trained, "train", "training"), (splits["test"], "test", "evaluation")):
        if not count:
            hint = f"; rejected: {reasons}" if reasons else ""
            raise InputError(
                f'source {config.data.source}: no row of {rows} is left for {name} (split "{split}"){hint}; name rows '
                f'of both splits in a column "split", or leave it out: then a tenth of the images is held out for '
                f"evaluation, of which there must be enough (found {selection.different_images} different ones)"
            )
    check_leaks(len(selection.leaked), splits["test"], config)
    if config.data.validation_share and not (splits["validation"] and splits["train"] + selection.known):
        raise InputError(
            f"data.validation_share = {config.data.validation_share} leaves {splits['train']} training and "
            f"{splits['validation']} validation questions: expected some of both; choose another share or add images"
        )


def describe_rejections(selection: Selection) -> str:
    """Return the most frequent reasons with their counts and an example of each, on one line."""
    return "; ".join(
        f"{count} x {selection.examples[kind].reason}, e.g. {selection.examples[kind].id}"
        for kind, count in selection.rejections.most_common(MAX_REJECTIONS_IN_ERROR)
    )


def check_leaks(leaked: int, evaluation: int, config: Config) -> None:
    """Raise InputError if too many evaluation questions show an image that training shows too."""
    limit = config.data.max_leaked_share
    if leaked > limit * evaluation:
        found = describe_leaks(leaked, evaluation, f", more than data.max_leaked_share ({limit:.1%})")
        raise InputError(f"source {config.data.source}: {found}")


def describe_leaks(leaked: int, evaluation: int, limit: str = "") -> str:
    """Return a sentence about evaluation questions whose image is trained on, and what to do."""
    return (
        f"{leaked:,} of {evaluation:,} evaluation questions ({leaked / evaluation:.1%}) show an image that training "
        f'also shows{limit}: give all rows of an image the same split, or leave out the column "split"'
    )
