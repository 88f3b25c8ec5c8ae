"""Shards: fixed lists of questions, the unit of generation, of determinism and of reuse.

A question's place follows from its digest alone (a judge's triples are planned likewise): questions are split by the
leading bits of their digests until no shard holds more than `LIMIT`. A new question changes only the shard it falls
into.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import pyarrow as pa

from masters.store import tables
from masters.store.artifacts import Artifact

LIMIT = 128  # questions; an engine answers a shard as one batch


class Placed(Protocol):
    """What has a place among shards: a digest in hexadecimal."""

    @property
    def digest(self) -> str: ...


T = TypeVar("T", bound=Placed)


@dataclass(frozen=True, order=True)
class Ref:
    """Where a question lies in the questions table. Ordered by digest, then id."""

    digest: str
    question_id: str
    file: int
    row: int


@dataclass(frozen=True)
class Shard:
    prefix: str  # of the digests' bits, "" for all
    refs: tuple[Ref, ...]

    @property
    def questions(self) -> list[list[str]]:
        """What takes part in identity: ids and digests, in order."""
        return [[ref.question_id, ref.digest] for ref in self.refs]


def references(data: Artifact, split: str) -> list[Ref]:
    """All questions of a split, sorted by digest; reads no images."""
    found = []
    for number, table in enumerate(data.batches("questions", ["question_id", "question_digest", "split"])):
        found += [
            Ref(row["question_digest"], row["question_id"], number, at)
            for at, row in enumerate(table.to_pylist())
            if row["split"] == split
        ]
    return sorted(found)


def plan(refs: list[Ref], limit: int = LIMIT) -> list[Shard]:
    """Split sorted references into shards of at most `limit` questions."""
    return [Shard(prefix, tuple(part)) for prefix, part in split(refs, limit)]


def split(items: Sequence[T], limit: int, prefix: str = "") -> list[tuple[str, Sequence[T]]]:
    """Parts of at most `limit` of items sorted by digest, each with the leading bits that its digests share."""
    if not items:
        return []
    if len(items) <= limit or len(prefix) == 64:
        return [(prefix, items)]
    middle = next((i for i, item in enumerate(items) if _bit(item.digest, len(prefix))), len(items))
    return split(items[:middle], limit, prefix + "0") + split(items[middle:], limit, prefix + "1")


class Reader:
    """Rows of the questions table by reference; keeps the last file read, as shards run along the files."""

    def __init__(self, data: Artifact) -> None:
        self._data, self._names = data, data.files("questions")
        self._number, self._table = -1, pa.table({})

    def rows(self, refs: tuple[Ref, ...]) -> Iterator[dict]:
        for ref in refs:
            if ref.file != self._number:
                self._number, self._table = ref.file, tables.read(self._data.storage, self._names[ref.file])
            yield {name: self._table[name][ref.row].as_py() for name in self._table.column_names}


def _bit(digest: str, position: int) -> int:
    return int(digest[position // 4], 16) >> (3 - position % 4) & 1
