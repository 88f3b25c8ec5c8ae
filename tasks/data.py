"""data: any source into the questions table; bad rows set aside with their reason.

Two passes over the source, so that memory does not grow with it: the first checks every row and keeps its light
key, the second writes what the limits keep. Rows fall into files by the leading digits of their digests, so that
a shard's questions lie side by side.
"""

from collections import Counter

from prefect import task
from prefect.cache_policies import NO_CACHE

from masters import ingest, schemas
from masters.artifacts import Artifact, Identity
from masters.config import Data
from masters.errors import InputError
from masters.identity import digest
from masters.sources import Source
from masters.storage import Storage
from masters.tasks.stage import Run, build_or_reuse

VERSION = 1
ROWS_PER_FILE = 2048  # about; buckets are split by 16
FILE_BYTES, BUFFER_BYTES = 32 << 20, 256 << 20


@task(name="data", cache_policy=NO_CACHE)
def data(run: Run) -> Artifact:
    """Tables `questions` and `rejected`."""
    config = run.config.data
    limits = dict(train_limit=config.train_limit, eval_limit=config.eval_limit)
    made_of = Identity("data", VERSION, limits, {"source": run.ready.source.digest()}, slug=run.config.name)

    def build() -> tuple[dict[str, str], dict, dict]:
        keys, rejected = survey(run.ready.source)
        kept = ingest.chosen(keys, {"train": config.train_limit, "test": config.eval_limit})
        splits = Counter(split for identifier, _, split in keys if identifier in kept)
        facts = dict(
            rows=len(kept), rejected=len(rejected), read=len(keys) + len(rejected), train=splits["train"],
            eval=splits["test"], reasons=reasons(rejected),
        )  # fmt: skip
        check(facts, config)
        files = write(run.storage, made_of.folder, run.ready.source, kept)
        table = schemas.encode([dict(id=r.id, reason=r.reason) for r in rejected], schemas.REJECTED)
        run.storage.write(f"{made_of.folder}/rejected/all.parquet", table)
        return files | {"rejected/all.parquet": digest(table)}, facts, {}

    artifact = build_or_reuse(run, made_of, build)
    check(artifact.facts, config)  # the allowed share is no part of identity: a reused table is held to today's
    return artifact


def survey(source: Source) -> tuple[list[tuple[str, str, str]], list[ingest.Rejected]]:
    """(id, digest, split) of every good row, and the rejections."""
    keys, rejected = [], []
    for row in ingest.validated(source):
        if isinstance(row, ingest.Rejected):
            rejected.append(row)
        else:
            keys.append((row["question_id"], row["question_digest"], row["split"]))
    return keys, rejected


def reasons(rejected: list[ingest.Rejected]) -> list[dict]:
    """Why rows were set aside, the commonest first: reason, count, and the first row's id."""
    first = {r.reason: r.id for r in reversed(rejected)}
    return [dict(reason=r, count=n, first=first[r]) for r, n in Counter(r.reason for r in rejected).most_common()]


def check(facts: dict, config: Data) -> None:
    """Raises InputError if too many rows were set aside or a split has no rows."""
    if not facts["read"]:
        raise InputError(f"data.source {config.source} holds no rows")
    share = facts["rejected"] / facts["read"]
    if share > config.max_rejected_share:
        why = "; ".join(f"{r['reason']} ({r['count']} rows, first {r['first']!r})" for r in facts["reasons"][:3])
        raise InputError(
            f"{facts['rejected']} of {facts['read']} rows ({share:.1%}) were rejected, data.max_rejected_share allows "
            f"{config.max_rejected_share:.1%}: {why}"
        )
    for split in ("train", "eval"):
        if not facts[split]:
            raise InputError(f"data.source {config.source} has no good rows in its {split} split; both train and test rows are needed")


def write(storage: Storage, folder: str, source: Source, kept: set[str]) -> dict[str, str]:
    """Write the kept rows, buffered by bucket. Returns {name: SHA-256}."""
    digits = 0
    while len(kept) > ROWS_PER_FILE * 16**digits:
        digits += 1
    buffers: dict[str, list[dict]] = {}
    sizes, parts, files = Counter(), Counter(), {}

    def flush(bucket: str) -> None:
        name = f"questions/{bucket or 'all'}-{parts[bucket]:05d}.parquet"
        encoded = schemas.encode(buffers.pop(bucket), schemas.QUESTIONS)
        storage.write(f"{folder}/{name}", encoded)
        files[name] = digest(encoded)
        parts[bucket] += 1
        del sizes[bucket]

    written: set[str] = set()
    for row in ingest.validated(source):
        if isinstance(row, ingest.Rejected) or row["question_id"] not in kept:
            continue
        bucket = row["question_digest"][:digits]
        buffers.setdefault(bucket, []).append(row)
        sizes[bucket] += len(row["image"]) + 1024
        written.add(row["question_id"])
        if sizes[bucket] > FILE_BYTES:
            flush(bucket)
        elif sizes.total() > BUFFER_BYTES:
            flush(sizes.most_common(1)[0][0])
    if written != kept:
        raise InputError(f"the data changed while it was read: {len(kept - written)} rows are gone; run again")
    for bucket in sorted(buffers):
        flush(bucket)
    return files
