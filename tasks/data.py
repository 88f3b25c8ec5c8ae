"""data: a source becomes the tables `questions` and `rejected`.

Two passes over the source. The first judges every row and keeps eight bytes a row: which ones to take. The second
reads those again and writes them. So memory does not grow with the images.
"""

import heapq
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from prefect import task

from masters import schemas
from masters.artifacts import Artifact, External, Identity
from masters.config import Config, Data
from masters.errors import InputError
from masters.identity import digest, unit_interval
from masters.ingest import Reject, Rejected, reread, validated
from masters.sources import Source
from masters.storage import Storage
from masters.tasks.stage import STAGE, Context, Run, build_or_reuse

VERSION = 6  # 5: image_digest; 6: accepted_answers

BUCKET_ROWS = 2048  # at most, on average
BUCKETS = (1, 16, 256, 4096)  # the leading 0 to 3 hexadecimal digits of the question digest
FILE_BYTES = 32 << 20  # of rows, before compression
BUFFER_BYTES = 256 << 20  # in all buckets together
REJECTED_ROWS = 10_000  # a file
CHANGED = "the data source changed while it was read; run again when nothing writes to it"

Question = tuple[str, str]  # id and digest


def identity(context: Context) -> Identity:
    """Content of the source, limits and the texts refused. How many rejections are tolerated shapes no row."""
    data = context.config.data
    limits = dict(train_limit=data.train_limit, eval_limit=data.eval_limit)
    semantic = limits | dict(special_tokens=list(context.ready.special_tokens))
    if data.validation_share:
        semantic |= dict(validation_share=data.validation_share)
    inputs = {"source": context.ready.source.digest()}
    if context.known:
        inputs["known"] = context.known.fingerprint
    return Identity("data", VERSION, semantic, inputs, slug=context.config.name)


@task(name="data", **STAGE)
def data(run: Run) -> Artifact:
    """Tables `questions` and `rejected`. Raises InputError if the source is at fault."""
    config, source, special_tokens = run.config, run.ready.source, run.ready.special_tokens
    made_of, known = identity(run), training_questions(run.known)

    def build() -> tuple[dict[str, str], dict, dict]:
        made = tables(config, source, run.storage, made_of.folder, special_tokens, known)
        if source.digest() != made_of.inputs["source"]:  # written to before the first pass: both found the new rows
            raise InputError(CHANGED)
        return *made, {}

    upstream: dict[str, Artifact | External] = {"source": origin(config.data, made_of.inputs["source"])}
    artifact = build_or_reuse(run, made_of, upstream | ({"known": run.known} if run.known else {}), build)
    facts, limit = artifact.facts, config.data.max_rejected_share
    # the tolerated share is no part of identity: a reused table is held to today's
    if facts["rejected"] > limit * facts["read"]:
        raise InputError(
            f"source {config.data.source}: {facts['rejected']} of {facts['read']} rows rejected, more than "
            f"data.max_rejected_share ({limit:.1%}); all of them: {artifact.uri}/rejected"
        )
    return artifact


def training_questions(data: Artifact | None) -> set[Question]:
    """Ids and digests of the training questions of a data artifact and of all that it left out as known."""
    found: set[Question] = set()
    while data:
        rows = data.rows("questions", ["question_id", "question_digest", "split"])
        found |= {(row["question_id"], row["question_digest"]) for row in rows if row["split"] == "train"}
        data = data.upstream("known")
    return found


def origin(data: Data, digest: str) -> External:
    """The source as lineage names it: an absolute path if it is one."""
    try:
        path = Path(data.source).expanduser()
        place = str(path.resolve()) if path.exists() else data.source
    except (OSError, RuntimeError):  # no possible file name
        place = data.source
    return External("source", f"{place}@{data.revision}" if data.revision else place, digest)


def tables(
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
        data = schemas.encode(rows, schema)
        storage.write(f"{folder}/{name}", data)
        files[name] = digest(data)

    limits = {"train": config.data.train_limit, "test": config.data.eval_limit}
    judged = judge(validated(source, special_tokens), limits, write, known)
    _check(judged, config, storage.uri(f"{folder}/rejected"))
    writer, splits, share = Writer(judged.chosen, write), Counter(), config.data.validation_share
    for row in chosen_rows(source, judged.marks):
        held = with_validation(row, share)
        splits[held["split"]] += 1
        writer.add(held)
    writer.close()
    if share:
        _check_validation(splits, judged, config)
    facts = dict(
        rows=judged.chosen, rejected=judged.rejected, read=len(judged.marks), known=judged.known,
        train=splits["train"], eval=splits["test"], reasons=dict(judged.kinds.most_common()),
    )  # fmt: skip
    return files, facts | (dict(validation=splits["validation"]) if share else {})


def with_validation(row: dict, share: float) -> dict:
    """The row, in split "validation" if its image belongs to this share of the training images.

    A hash of the image decides, so that no image is both trained and validated on, and more rows move none.
    """
    held = row["split"] == "train" and unit_interval(digest(f"validation {row['image_digest']}".encode())) < share
    return row | dict(split="validation") if held else row


@dataclass
class Judged:
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
) -> Judged:
    """Look at every row, write the rejected, and mark the rows to take: per split, those of the smallest rank.

    A row's rank depends on it alone, so that more rows never reshuffle the choice.
    """
    judged, rejected, parts = Judged(), [], 0
    best: dict[str, list[tuple[int, int]]] = {split: [] for split in limits}  # heaps of (-rank, position)
    for position, row in enumerate(rows):
        judged.marks.append(0)
        if isinstance(row, Rejected):
            judged.kinds[row.kind] += 1
            judged.examples.setdefault(row.kind, row)
            rejected.append(dict(id=row.id, reason=row.reason))
            if len(rejected) == REJECTED_ROWS:
                write(f"rejected/{parts:04d}.parquet", rejected, schemas.REJECTED)
                rejected, parts = [], parts + 1
            continue
        if row["split"] == "train" and (row["question_id"], row["question_digest"]) in known:
            judged.known += 1
            continue
        split, limit, heap = row["split"], limits[row["split"]], best[row["split"]]
        judged.marks[position] = mark(row)
        judged.splits[split] += 1
        if limit is not None:
            heapq.heappush(heap, (-rank(row), position))
            if len(heap) > limit:
                judged.marks[heapq.heappop(heap)[1]] = 0
                judged.splits[split] -= 1
    if rejected or not parts:  # the table is there even if nothing was rejected
        write(f"rejected/{parts:04d}.parquet", rejected, schemas.REJECTED)
    return judged


def rank(row: dict) -> int:
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


class Writer:
    """Questions by bucket of their digest: neighbours in digest lie in one file, as shards want them.

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
        self._write(f"questions/{bucket}-{self._parts[bucket]:03d}.parquet", self._rows.pop(bucket), schemas.QUESTIONS)
        self._parts[bucket] += 1
        self._total -= self._bytes.pop(bucket)


def _check_validation(splits: Counter, judged: Judged, config: Config) -> None:
    """Raises InputError if the training questions cannot be shared out."""
    if splits["validation"] and (splits["train"] or judged.known):
        return
    raise InputError(
        f"data.validation_share = {config.data.validation_share} leaves {splits['train']} training and "
        f"{splits['validation']} validation questions: expected some of both; take another share, or more images"
    )


def _check(judged: Judged, config: Config, where: str) -> None:
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
