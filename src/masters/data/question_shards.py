"""Split questions into shards: fixed lists of questions that are generated as one batch and reused as a whole.

Questions are split by the leading bits of their digests until no shard holds more than `LIMIT`, so a new question
changes only the shard that it falls into. A judge's triples are split in the same way.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import pyarrow as pa

from masters.store import tables
from masters.store.artifacts import Artifact

LIMIT = 128  # questions per shard; an engine answers a shard as one batch
MAX_PREFIX = 64  # bits; items that share this many stay together


class HasDigest(Protocol):
    """An item with a SHA-256 digest in hexadecimal, which decides its shard."""

    @property
    def digest(self) -> str: ...


T = TypeVar("T", bound=HasDigest)


@dataclass(frozen=True, order=True)
class QuestionRef:
    """Position of a question in the questions table: file number and row. Ordered by digest, then id."""

    digest: str
    question_id: str
    file: int
    row: int


@dataclass(frozen=True)
class Shard:
    """A fixed list of questions. `prefix`: the leading bits that their digests share, "" for a single shard."""

    prefix: str
    refs: tuple[QuestionRef, ...]

    @property
    def questions(self) -> list[list[str]]:
        """Ids and digests in order, as they take part in identities."""
        return [[ref.question_id, ref.digest] for ref in self.refs]


def read_refs(data: Artifact, split: str) -> list[QuestionRef]:
    """Read references to all questions of a split, sorted by digest. Images are not read."""
    refs = []
    for file, table in enumerate(data.batches("questions", ["question_id", "question_digest", "split"])):
        refs += [
            QuestionRef(row["question_digest"], row["question_id"], file, number)
            for number, row in enumerate(table.to_pylist())
            if row["split"] == split
        ]
    return sorted(refs)


def plan_shards(refs: list[QuestionRef], limit: int = LIMIT) -> list[Shard]:
    """Split sorted references into shards of at most `limit` questions."""
    return [Shard(prefix, tuple(part)) for prefix, part in split_by_digest(refs, limit)]


def split_by_digest(items: Sequence[T], limit: int, prefix: str = "") -> list[tuple[str, Sequence[T]]]:
    """Split items sorted by digest into parts of at most `limit`, each with the leading bits that its digests share.

    Items whose digests share `MAX_PREFIX` bits stay together even above the limit.
    """
    if not items:
        return []
    if len(items) <= limit or len(prefix) == MAX_PREFIX:
        return [(prefix, items)]
    middle = next((at for at, item in enumerate(items) if _bit(item.digest, len(prefix))), len(items))
    return split_by_digest(items[:middle], limit, prefix + "0") + split_by_digest(items[middle:], limit, prefix + "1")


class QuestionReader:
    """Reads rows of the questions table by reference. Keeps the last file, as shards follow the order of files."""

    def __init__(self, data: Artifact) -> None:
        self._storage, self._files = data.storage, data.files("questions")
        self._file, self._table = -1, pa.table({})

    def rows(self, refs: tuple[QuestionRef, ...]) -> Iterator[dict]:
        for ref in refs:
            if ref.file != self._file:
                self._file, self._table = ref.file, tables.read(self._storage, self._files[ref.file])
            yield {name: self._table[name][ref.row].as_py() for name in self._table.column_names}


def _bit(digest: str, position: int) -> int:
    return int(digest[position // 4], 16) >> (3 - position % 4) & 1
