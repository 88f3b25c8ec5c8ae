"""A judge's process beside the engines: a server gives verdicts on shards as they come, so that `score` finds them.

`python -m masters.models.judging.ahead_worker JOB.json`; the job is made by `masters.models.judging.batches.ahead`.
Whatever goes wrong here is left to `score`, which asks for the verdicts that are missing and says why they cannot be
had.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from masters.common.errors import MastersError
from masters.common.hashing import fingerprint
from masters.config import Runtime
from masters.execution import processes
from masters.models.judging import batches
from masters.models.judging.worker import make_judge_client
from masters.rewards.judge import JudgeClient, judge
from masters.rewards.verdict import FINAL, Triple
from masters.store import artifacts, tables
from masters.store.storage import Storage

PAUSE = 2.0  # seconds between two looks at the store


def main(job_file: Path) -> None:
    job = json.loads(job_file.read_text())
    storage = Storage(job["store"])
    try:
        voice = make_judge_client(job["reach"], Runtime(**job["runtime"]))
        for triples in _coming(storage, job, job_file):
            if not _judged(storage, voice, triples, job["folder"]):
                print("the judge gave no verdict: the stage score will ask again", file=sys.stderr)
                return
            processes.report(job_file, event="judged", judged=len(triples))
    except MastersError as error:
        print(f"judging ahead ended: {error}", file=sys.stderr)


def _coming(storage: Storage, job: dict, job_file: Path) -> Iterator[list[Triple]]:
    """Triples that have no verdict, batch by batch, of each shard when it is there. Waits for the last of them."""
    data = artifacts.load(storage, job["data"])
    asked = batches.untold(data)
    known, waiting = batches.stored_verdict_digests(storage, job["folder"]), set(job["shards"])
    while waiting:
        processes.report(job_file, event="waiting")  # a sign of life
        ready = waiting & set(storage.names(job["responses"]))
        for shard in sorted(ready):
            rows = tables.read(storage, shard, ["question_id", "text"]).to_pylist()
            triples = {replace(asked[row["question_id"]], text=row["text"]) for row in rows}
            new = sorted((t for t in triples if t.digest not in known), key=lambda triple: triple.digest)
            known.update(triple.digest for triple in new)
            yield from (new[at : at + batches.BATCH] for at in range(0, len(new), batches.BATCH))
        waiting -= ready
        if waiting:
            time.sleep(PAUSE)


def _judged(storage: Storage, voice: JudgeClient, triples: list[Triple], folder: str) -> bool:
    """Keep the final verdicts on a batch. Returns whether there was any."""
    judged = zip(triples, judge(voice, triples), strict=True)
    rows = [batches.row(triple, verdict) for triple, verdict in judged if verdict.status in FINAL]
    if rows:
        name = fingerprint([triple.digest for triple in triples])
        storage.create(f"{folder}/{name}.parquet", tables.encode(rows, tables.JUDGEMENTS))
    return bool(rows)


if __name__ == "__main__":
    processes.child_main(main)
