"""Second pass over a source: write the tables `questions` and `rejected`, in files by the digest of a question."""

from collections import Counter
from collections.abc import Set
from pathlib import Path

import pyarrow as pa

from masters.common.hashing import digest
from masters.config import Config, Data
from masters.data.question_selection import (
    QuestionKey,
    WriteTable,
    assign_validation,
    check_selection,
    read_selected,
    select_questions,
)
from masters.data.sources import Source
from masters.store import tables
from masters.store.artifacts import External
from masters.store.storage import Storage

BUCKET_ROWS = 2048  # at most, on average
BUCKETS = (1, 16, 256, 4096)  # named by the leading 0 to 3 hexadecimal digits of the question digest
FILE_BYTES = 32 << 20  # of rows, before compression
BUFFER_BYTES = 256 << 20  # in all buckets together


def source_origin(data: Data, digest: str) -> External:
    """Describe the source for lineage, by its absolute path if it is a file or folder."""
    try:
        path = Path(data.source).expanduser()
        uri = str(path.resolve()) if path.exists() else data.source
    except (OSError, RuntimeError):  # not a possible file name
        uri = data.source
    return External("source", f"{uri}@{data.revision}" if data.revision else uri, digest)


def write_tables(
    config: Config,
    source: Source,
    storage: Storage,
    folder: str,
    special_tokens: tuple[str, ...] = (),
    known: Set[QuestionKey] = frozenset(),
) -> tuple[dict[str, str], dict]:
    """Write both tables below `folder`, without the known training questions.

    Returns {name: SHA-256} of the files, and the facts for the artifact's record.
    """
    files: dict[str, str] = {}

    def write(name: str, rows: list[dict], schema: pa.Schema) -> None:
        content = tables.encode(rows, schema)
        storage.write(f"{folder}/{name}", content)
        files[name] = digest(content)

    selection = select_questions(config, source, write, special_tokens, known)
    check_selection(selection, config, storage.uri(f"{folder}/rejected"))
    writer, splits, share = QuestionWriter(selection.selected, write), selection.splits, config.data.validation_share
    for question in read_selected(source, selection.marks):
        writer.add(assign_validation(question, share))
    writer.close()
    facts = dict(
        rows=selection.selected,
        rejected=selection.rejected,
        read=len(selection.marks),
        known=selection.known,
        train=splits["train"],
        eval=splits["test"],
        leaked=len(selection.leaked),
        reasons=dict(selection.rejections.most_common()),
        remarks=dict(selection.changes),
    )
    if share:
        facts |= dict(validation=splits["validation"])
    if config.data.fetch_images:
        facts |= dict(fetch_images=True)  # `masters lineage` computes the source's digest again
    return files, facts


class QuestionWriter:
    """Writes questions in files by bucket of their digest, so that a shard's questions lie in few files.

    A bucket starts a new file when it is large. When all buckets together are large, the largest one does.
    """

    def __init__(self, rows: int, write: WriteTable) -> None:
        count = next((buckets for buckets in BUCKETS if rows <= buckets * BUCKET_ROWS), BUCKETS[-1])
        self._digits, self._write = BUCKETS.index(count), write
        self._rows: dict[str, list[dict]] = {}
        self._bytes: Counter[str] = Counter()
        self._files: Counter[str] = Counter()
        self._total_bytes = 0

    def add(self, row: dict) -> None:
        bucket = row["question_digest"][: self._digits] or "all"
        self._rows.setdefault(bucket, []).append(row)
        size = len(row["image"]) + len(row["question"]) + sum(map(len, row["accepted_answers"]))
        self._bytes[bucket] += size
        self._total_bytes += size
        if self._bytes[bucket] > FILE_BYTES:
            self._flush(bucket)
        elif self._total_bytes > BUFFER_BYTES:
            self._flush(max(sorted(self._bytes), key=self._bytes.__getitem__))

    def close(self) -> None:
        for bucket in sorted(self._rows):
            self._flush(bucket)

    def _flush(self, bucket: str) -> None:
        self._write(f"questions/{bucket}-{self._files[bucket]:03d}.parquet", self._rows.pop(bucket), tables.QUESTIONS)
        self._files[bucket] += 1
        self._total_bytes -= self._bytes.pop(bucket)
