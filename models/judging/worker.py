"""The judge's process: gives verdicts on batches of triples and keeps what was said, a Parquet file a batch.

`python -m masters.models.judging.worker JOB.json`, or an actor on Ray if the engine is ours; the job is made by
`masters.models.judging.batches`.
"""

import json
from pathlib import Path

from masters.config import Runtime
from masters.execution import processes
from masters.models.judging.batches import row
from masters.rewards.judge import JudgeClient, judge
from masters.rewards.verdict import FINAL, Triple
from masters.store import tables
from masters.store.storage import Storage


class Verdicts:
    """A judge that gives verdicts on batches. Its process ends with it."""

    def __init__(self, setup: dict) -> None:
        self._storage = Storage(setup["store"])
        self._voice = make_judge_client(setup["reach"], Runtime(**setup["runtime"]))

    def do(self, batch: dict) -> dict:
        """Judge a batch and keep what is final; its line of progress."""
        triples = [Triple.from_json(parts) for parts in batch["triples"]]
        judged = list(zip(triples, judge(self._voice, triples), strict=True))
        final = [row(triple, verdict) for triple, verdict in judged if verdict.status in FINAL]
        if final:
            self._storage.create(batch["out"], tables.encode(final, tables.JUDGEMENTS))
        others = [[t.digest, v.status, v.explanation] for t, v in judged if v.status not in FINAL]
        return dict(event="batch", triples=len(triples), others=others)


opened = Verdicts


def main(job_file: Path) -> None:
    job = json.loads(job_file.read_text())
    verdicts = opened(job)
    processes.report(job_file, event="ready")
    for batch in job["pieces"]:
        processes.report(job_file, **verdicts.do(batch))


def make_judge_client(reach: dict, runtime: Runtime) -> JudgeClient:
    """Who answers: the server at a URL, or an engine on a folder. Only the one that is needed is imported."""
    if "url" in reach:
        from masters.rewards.judge_server import Server

        return Server(reach["url"], reach["model"], runtime.judge_requests, runtime.judge_timeout)
    from masters.models.judging.engine import EngineJudge

    return EngineJudge(Path(reach["folder"]), reach["dtype"], runtime, reach["own_code"])


if __name__ == "__main__":
    processes.child_main(main)
