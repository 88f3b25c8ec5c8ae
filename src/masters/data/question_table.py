"""Second pass over a source: write the tables `questions` and `rejected`, in files by the digest of a question."""

from collections import Counter
from collections.abc import Callable, Set
from pathlib import Path

import pyarrow as pa

from masters.common.hashing import digest
from masters.config import Config, Data
from masters.data.selection import Question, check_selection, check_validation, chosen_rows, judge, with_validation
from masters.data.sources import Source
from masters.data.validation import validated
from masters.store import tables
from masters.store.artifacts import External
from masters.store.storage import Storage

BUCKET_ROWS = 2048  # at most, on average
BUCKETS = (1, 16, 256, 4096)  # the leading 0 to 3 hexadecimal digits of the question digest
FILE_BYTES = 32 << 20  # of rows, before compression
BUFFER_BYTES = 256 << 20  # in all buckets together


def origin(data: Data, digest: str) -> External:
    """The source as lineage names it: an absolute path if it is one."""
    try:
        path = Path(data.source).expanduser()
        place = str(path.resolve()) if path.exists() else data.source
    except (OSError, RuntimeError):  # no possible file name
        place = data.source
    return External("source", f"{place}@{data.revision}" if data.revision else place, digest)


def write_tables(
    config: Config,
    source: Source,
    storage: Storage,
    folder: str,
    special_tokens: tuple[str, ...] = (),
    known: Set[Question] = frozenset(),
) -> tuple[dict[str, str], dict]:
    """Write both tables below `folder`, without known training questions. Returns {name: SHA-256} and the facts for
    the record.
    """
    files: dict[str, str] = {}

    def write(name: str, rows: list[dict], schema: pa.Schema) -> None:
        data = tables.encode(rows, schema)
        storage.write(f"{folder}/{name}", data)
        files[name] = digest(data)

    limits = {"train": config.data.train_limit, "test": config.data.eval_limit}
    judged = judge(validated(source, special_tokens), limits, write, known)
    check_selection(judged, config, storage.uri(f"{folder}/rejected"))
    writer, splits, share = QuestionWriter(judged.chosen, write), Counter(), config.data.validation_share
    for row in chosen_rows(source, judged.marks):
        held = with_validation(row, share)
        splits[held["split"]] += 1
        writer.add(held)
    writer.close()
    if share:
        check_validation(splits, judged, config)
    facts = dict(
        rows=judged.chosen, rejected=judged.rejected, read=len(judged.marks), known=judged.known,
        train=splits["train"], eval=splits["test"], reasons=dict(judged.kinds.most_common()),
    )  # fmt: skip
    return files, facts | (dict(validation=splits["validation"]) if share else {})


class QuestionWriter:
    """Questions by bucket of their digest: neighbors in digest lie in one file, as shards want them.

    A bucket goes to a new file when it is large, the largest bucket when all together are.
    """

    def __init__(self, rows: int, write: Callable[[str, list[dict], pa.Schema], None]) -> None:
        count = next((b for b in BUCKETS if rows <= b * BUCKET_ROWS), BUCKETS[-1])
        self._digits, self._write = BUCKETS.index(count), write
        self._rows: dict[str, list[dict]] = {}
        self._bytes: Counter = Counter()
        self._parts: Counter = Counter()
        self._total = 0

    def add(self, row: dict) -> None:
        bucket = row["question_digest"][: self._digits] or "all"
        size = len(row["image"]) + len(row["question"]) + sum(map(len, row["accepted_answers"]))
        self._rows.setdefault(bucket, []).append(row)
        self._bytes[bucket] += size
        self._total += size
        if self._bytes[bucket] > FILE_BYTES:
            self._flush(bucket)
        elif self._total > BUFFER_BYTES:
            self._flush(max(sorted(self._bytes), key=self._bytes.__getitem__))

    def close(self) -> None:
        for bucket in sorted(self._rows):
            self._flush(bucket)

    def _flush(self, bucket: str) -> None:
        self._write(f"questions/{bucket}-{self._parts[bucket]:03d}.parquet", self._rows.pop(bucket), tables.QUESTIONS)
        self._parts[bucket] += 1
        self._total -= self._bytes.pop(bucket)
