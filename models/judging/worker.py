"""The judge's process: gives verdicts on batches of triples and stores the final ones, a Parquet file a batch.

`python -m masters.models.judging.worker JOB.json`, or an actor on Ray if the judge is an engine.
`masters.models.judging.batches` makes the job, a `JudgeJob`.
"""

from pathlib import Path

from masters.config import Runtime
from masters.execution import processes
from masters.execution.events import BatchJudged, EngineStarted
from masters.models.judging.batches import judgement_row
from masters.models.judging.job import JudgeBatch, JudgeEndpoint, JudgeJob, JudgeSetup, ServerEndpoint
from masters.rewards.judge import JudgeClient, judge_triples
from masters.rewards.verdict import FINAL_STATUSES, Status
from masters.store import tables
from masters.store.storage import Storage


class Worker:
    """A judge that gives verdicts on batches. Its process ends with it."""

    Setup, Piece = JudgeSetup, JudgeBatch

    def __init__(self, setup: JudgeSetup) -> None:
        self._storage = Storage(setup.store)
        self._client = make_judge_client(setup.endpoint, setup.runtime)

    def do(self, batch: JudgeBatch) -> BatchJudged:
        """Judge a batch and store its final verdicts."""
        judged = list(zip(batch.triples, judge_triples(self._client, list(batch.triples)), strict=True))
        rows = [judgement_row(triple, verdict) for triple, verdict in judged if verdict.status in FINAL_STATUSES]
        if rows:
            self._storage.create(batch.out, tables.encode(rows, tables.JUDGEMENTS))
        without_verdict: list[tuple[str, Status, str]] = [
            (triple.digest, verdict.status, verdict.explanation)
            for triple, verdict in judged
            if verdict.status not in FINAL_STATUSES
        ]
        return BatchJudged(triples=len(batch.triples), without_verdict=without_verdict)


def main(job_file: Path) -> None:
    job = JudgeJob.model_validate_json(job_file.read_text())
    worker = Worker(job.setup)
    processes.report_event(job_file, EngineStarted())
    for batch in job.pieces:
        processes.report_event(job_file, worker.do(batch))


def make_judge_client(endpoint: JudgeEndpoint, runtime: Runtime) -> JudgeClient:
    """Connect to the server at a URL, or start an engine on a folder. Imports only what the endpoint needs."""
    if isinstance(endpoint, ServerEndpoint):
        from masters.rewards.judge_server import ServerJudge

        return ServerJudge(endpoint.url, endpoint.model, runtime.judge_requests, runtime.judge_timeout)
    from masters.models.judging.engine import EngineJudge

    return EngineJudge(endpoint.folder, endpoint.dtype, runtime, endpoint.trust_remote_code)


if __name__ == "__main__":
    processes.child_main(main)
