"""The process that judges early: while engines generate, a server judges each shard as soon as it is in the store.

`python -m masters.models.judging.ahead_worker JOB.json`. `masters.models.judging.batches.start_early_judging` makes the
job, an `EarlyJudgingJob`. Errors are left to the stage score, which asks for the missing verdicts and reports why they
cannot be had.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from masters.common.errors import MastersError
from masters.common.hashing import fingerprint
from masters.execution import processes
from masters.execution.events import JudgedEarly, WaitingForShards
from masters.models.judging import batches
from masters.models.judging.job import EarlyJudgingJob
from masters.models.judging.worker import make_judge_client
from masters.rewards.judge import JudgeClient, judge_triples
from masters.rewards.verdict import FINAL_STATUSES, Triple
from masters.store import artifacts, tables
from masters.store.storage import Storage

LISTING_INTERVAL = 2.0  # seconds between two listings of the store


def main(job_file: Path) -> None:
    job = EarlyJudgingJob.model_validate_json(job_file.read_text())
    storage = Storage(job.store)
    try:
        client = make_judge_client(job.endpoint, job.runtime)
        for triples in _wait_for_batches(storage, job, job_file):
            if not _store_verdicts(storage, client, triples, job.folder):
                print("the judge gave no verdict: the stage score will ask again", file=sys.stderr)
                return
            processes.report_event(job_file, JudgedEarly(judged=len(triples)))
    except MastersError as error:
        print(f"early judging ended: {error}", file=sys.stderr)


def _wait_for_batches(storage: Storage, job: EarlyJudgingJob, job_file: Path) -> Iterator[list[Triple]]:
    """Yield batches of triples without a verdict, shard by shard as they appear, until all shards are there."""
    questions = batches.read_questions(artifacts.load(storage, job.data))
    judged, waiting = batches.stored_verdict_digests(storage, job.folder), set(job.shards)
    while waiting:
        processes.report_event(job_file, WaitingForShards())
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


def _store_verdicts(storage: Storage, client: JudgeClient, triples: list[Triple], folder: str) -> bool:
    """Judge a batch and store its final verdicts. Returns whether there was any."""
    judged = zip(triples, judge_triples(client, triples), strict=True)
    rows = [batches.judgement_row(triple, verdict) for triple, verdict in judged if verdict.status in FINAL_STATUSES]
    if rows:
        name = fingerprint([triple.digest for triple in triples])
        storage.create(f"{folder}/{name}.parquet", tables.encode(rows, tables.JUDGEMENTS))
    return bool(rows)


if __name__ == "__main__":
    processes.child_main(main)
