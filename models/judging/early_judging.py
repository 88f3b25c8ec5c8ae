"""The process that judges early: while engines generate, a server judges each shard as soon as it is in the store.

`python -m masters.models.judging.early_judging JOB.json`. `masters.models.judging.batches.start_early_judging` makes
the job, an `EarlyJudgingJob`. Errors are left to the stage score, which asks for the missing verdicts and says why they
cannot be had.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from masters.common.errors import MastersError
from masters.common.hashing import fingerprint
from masters.execution import child_process
from masters.execution.events import JudgedEarly, WaitingForShards
from masters.models.judging import batches
from masters.models.judging.job import EarlyJudgingJob, JudgeBatch
from masters.models.judging.worker import Worker
from masters.rewards.verdict import Triple
from masters.store import artifacts, tables
from masters.store.storage import Storage

LISTING_INTERVAL = 2.0  # seconds between two listings of the store


def main(job_file: Path) -> None:
    job = EarlyJudgingJob.model_validate_json(job_file.read_text())
    try:
        worker = Worker(job.setup)
        for triples in _wait_for_batches(Storage(job.setup.store), job, job_file):
            name = fingerprint([triple.digest for triple in triples])
            judged = worker.do(JudgeBatch(out=f"{job.folder}/{name}.parquet", triples=tuple(triples)))
            if len(judged.without_verdict) == len(triples):
                print("the judge gave no verdict: the stage score will ask again", file=sys.stderr)
                return
            child_process.report_event(job_file, JudgedEarly(judged=len(triples)))
    except MastersError as error:
        print(f"early judging ended: {error}", file=sys.stderr)


def _wait_for_batches(storage: Storage, job: EarlyJudgingJob, job_file: Path) -> Iterator[list[Triple]]:
    """Yield batches of triples without a verdict, shard by shard as they appear, until all shards are there."""
    questions = batches.read_questions(artifacts.load(storage, job.data))
    judged, waiting = batches.stored_verdict_digests(storage, job.folder), set(job.shards)
    while waiting:
        child_process.report_event(job_file, WaitingForShards())
        ready = waiting & set(storage.names(job.responses))
        for shard in sorted(ready):
            rows = tables.read(storage, shard, ["question_id", "text"]).to_pylist()
            triples = {replace(questions[row["question_id"]], text=row["text"]) for row in rows}
            new = sorted((t for t in triples if t.digest not in judged), key=lambda triple: triple.digest)
            judged.update(triple.digest for triple in new)
            yield from (new[start : start + batches.BATCH] for start in range(0, len(new), batches.BATCH))
        waiting -= ready
        if waiting:
            time.sleep(LISTING_INTERVAL)


if __name__ == "__main__":
    child_process.child_main(main)
