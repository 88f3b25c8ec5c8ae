"""The judge's process: gives verdicts on batches of triples and stores the final ones, one Parquet file per batch.

`python -m masters.models.judging.worker JOB.json`, or an actor on Ray if the judge is an engine.
`masters.models.judging.batches` makes the job, a `JudgeJob`.
"""

from collections import Counter
from pathlib import Path

from masters.common.errors import WorkerError
from masters.config import Runtime
from masters.execution import child_process
from masters.execution.events import BatchJudged, EngineStarted
from masters.models.judging.batches import BATCH, judgement_row
from masters.models.judging.job import JudgeBatch, JudgeEndpoint, JudgeJob, JudgeSetup, ServerEndpoint
from masters.rewards.judge import JudgeClient, judge_triples
from masters.rewards.judge_recorder import RecordingClient
from masters.rewards.verdict import FINAL_STATUSES, Status, Triple, Verdict
from masters.store import tables
from masters.store.storage import Storage

FIRST_TEXTS = 20  # without any verdict on these, a judge is asked about no others


class Worker:
    """A judge that gives verdicts on batches. Its process ends with it."""

    Setup, Piece = JudgeSetup, JudgeBatch

    def __init__(self, setup: JudgeSetup) -> None:
        self._storage, self._limits, self._is_proven = Storage(setup.store), setup.limits, setup.is_proven
        self._client = make_judge_client(setup.endpoint, setup.runtime)
        # a server takes single texts; an engine always takes whole batches, as its numbers depend on them a little
        self._first_count = FIRST_TEXTS if isinstance(setup.endpoint, ServerEndpoint) else BATCH
        self._unreadable = Counter[Status]()

    def do(self, batch: JudgeBatch) -> BatchJudged:
        """Judge a batch and store its final verdicts, once the judge has given one that can be read.

        Raises WorkerError if there is none on the first texts.
        """
        judged = self._judge(list(batch.triples))
        stored = FINAL_STATUSES if self._is_proven else ()
        rows = [judgement_row(triple, verdict) for triple, verdict in judged if verdict.status in stored]
        if rows:
            self._storage.create(batch.out, tables.encode(rows, tables.JUDGEMENTS))
        without_verdict: list[tuple[str, Status, str]] = [
            (triple.digest, verdict.status, verdict.explanation)
            for triple, verdict in judged
            if verdict.status not in stored
        ]
        return BatchJudged(triples=len(batch.triples), without_verdict=without_verdict)

    def _judge(self, triples: list[Triple]) -> list[tuple[Triple, Verdict]]:
        """Judge triples, a few at a time until the judge has given a verdict."""
        judged: list[tuple[Triple, Verdict]] = []
        while rest := triples[len(judged) :]:
            part = rest if self._is_proven else rest[: self._first_count]
            client = RecordingClient(self._client, self._limits)
            verdicts = judge_triples(client, part, self._limits)
            if not self._is_proven:
                self._check_first(client, verdicts)
            judged += zip(part, verdicts, strict=True)
        return judged

    def _check_first(self, client: RecordingClient, verdicts: list[Verdict]) -> None:
        """Record whether there is a verdict. If the judge could not be reached, work continues: it is asked again.

        Raises WorkerError if the first texts have replies and none is a verdict.
        """
        self._is_proven = any(verdict.status == "ok" for verdict in verdicts)
        self._unreadable.update(v.status for v in verdicts if v.status in ("parse_failed", "refused"))
        if not self._is_proven and (count := self._unreadable.total()) >= FIRST_TEXTS:
            statuses = ", ".join(f"{status} {number}" for status, number in sorted(self._unreadable.items()))
            raise WorkerError(
                f"the judge gave no verdict on any of the first {count} texts ({statuses}), and the others were not "
                f"sent: {client.explain_no_verdict()}"
            )


def main(job_file: Path) -> None:
    job = JudgeJob.model_validate_json(job_file.read_text())
    worker = Worker(job.setup)
    child_process.report_event(job_file, EngineStarted())
    for batch in job.pieces:
        child_process.report_event(job_file, worker.do(batch))


def make_judge_client(endpoint: JudgeEndpoint, runtime: Runtime) -> JudgeClient:
    """Connect to the server at a URL, or start an engine on a folder. Imports only what the endpoint needs."""
    if isinstance(endpoint, ServerEndpoint):
        from masters.rewards.judge_server import ServerJudge

        return ServerJudge(
            endpoint.url, endpoint.model, runtime.judge_requests, runtime.judge_timeout, style=endpoint.style
        )
    from masters.models.judging.engine import EngineJudge

    return EngineJudge(endpoint.folder, endpoint.dtype, runtime, endpoint.trust_remote_code)


if __name__ == "__main__":
    child_process.child_main(main)
