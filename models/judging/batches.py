"""Have a judge give verdicts on triples. Each distinct triple is judged once: earlier verdicts are read from the store.

Verdicts lie at `shards/judgements/<fingerprint of the judge>/*.parquet`, one file per batch. Batches are planned by the
digests of all triples, so a run that was interrupted continues with the same batches. Only final verdicts are stored: a
judge that could not be reached is asked again.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from masters.common.hashing import fingerprint
from masters.config import Runtime
from masters.data.question_shards import split_by_digest
from masters.execution import engines, processes
from masters.execution.engines import EngineJob, EngineWork, OnEvent
from masters.execution.events import BatchJudged, EngineEvent, parse_event
from masters.execution.processes import Child, WorkerModule
from masters.models.judging.job import JudgeBatch, JudgeEndpoint, JudgeSetup, ServerEndpoint
from masters.rewards import judge_prompts, judge_replies
from masters.rewards.judge_prompts import DEFAULT_LIMITS, TokenLimits
from masters.rewards.verdict import Triple, Verdict
from masters.store import tables
from masters.store.artifacts import Artifact
from masters.store.storage import Storage

VERSION = 1  # of how judges are asked; with a new version every verdict is asked for again
BATCH = 512  # triples that an engine judges together
BATCHES_PER_ENGINE = 4  # with fewer, starting another engine takes longer than it saves


@dataclass(frozen=True)
class Judge:
    """An LLM that judges: its name in tables, what determines its verdicts, and how a process reaches it."""

    name: str
    model: dict  # literals: digest of a folder and data type, or a server's URL and model
    endpoint: JudgeEndpoint  # never part of the identity, except for its kind
    limits: TokenLimits = DEFAULT_LIMITS

    @property
    def identity(self) -> dict:
        sampling = dict(temperature=0, max_tokens=asdict(self.limits))
        identity = dict(version=VERSION, prompts=judge_prompts.VERSION, sampling=sampling, model=self.model)
        # not for engines: this version reads the same score in every reply that earlier ones could read
        return identity | (dict(replies=judge_replies.VERSION) if isinstance(self.endpoint, ServerEndpoint) else {})

    @property
    def folder(self) -> str:
        """The folder in the store that keeps this judge's verdicts."""
        return f"shards/judgements/{fingerprint(self.identity)}"


def read_questions(data: Artifact) -> dict[str, Triple]:
    """Return question and accepted answers by question_id, as triples with an empty text."""
    columns = ["question_id", "question", "answer", "accepted_answers"]
    return {
        row["question_id"]: Triple(row["question"], row["answer"], "", tuple(row["accepted_answers"][1:]))
        for row in data.rows("questions", columns)
    }


def stored_verdicts(storage: Storage, judge: Judge, triples: list[Triple]) -> dict[Triple, Verdict]:
    """Return the judge's stored verdicts on these triples."""
    by_digest, verdicts = {triple.digest: triple for triple in triples}, {}
    columns = ["triple_digest", "score", "status", "explanation", "reading"]
    for name in storage.names(judge.folder):
        for row in tables.read(storage, name, columns).to_pylist():
            if triple := by_digest.get(row.pop("triple_digest")):
                verdicts.setdefault(triple, Verdict(**row))
    return verdicts


def run_judging(
    storage: Storage,
    judge: Judge,
    triples: list[Triple],
    runtime: Runtime,
    folder: Path,
    on_progress: Callable[[int, int], None],
) -> tuple[dict[Triple, Verdict], dict]:
    """Return a verdict on every triple, and statistics: triples `asked` now, those `answered`, and the processes."""
    ordered = sorted(triples, key=lambda triple: triple.digest)
    earlier = stored_verdicts(storage, judge, ordered)
    planned = [[t for t in batch if t not in earlier] for _, batch in split_by_digest(ordered, BATCH)]
    asked = {triple.digest: triple for batch in planned for triple in batch}
    done, without_verdict = 0, {}

    def count(event: EngineEvent) -> None:
        nonlocal done
        if isinstance(event, BatchJudged):
            done += event.triples
            for triple, status, reason in event.without_verdict:
                without_verdict[asked[triple]] = Verdict(None, status, reason)
        on_progress(done, len(asked))

    on_progress(0, len(asked))
    is_proven = any(verdict.status == "ok" for verdict in earlier.values())
    batches = [batch for batch in planned if batch]
    statistics = _judge_batches(storage, judge, batches, runtime, folder, count, is_proven)
    verdicts = without_verdict | (stored_verdicts(storage, judge, ordered) if asked else earlier)
    counts = dict(triples=len(triples), asked=len(asked), answered=len(asked) - len(without_verdict))
    return verdicts, counts | statistics


def judgement_row(triple: Triple, verdict: Verdict) -> dict:
    """Return a row of the judgements table."""
    return dict(
        triple_digest=triple.digest,
        question=triple.question,
        reference=triple.reference,
        text=triple.text,
        score=verdict.score,
        status=verdict.status,
        explanation=verdict.explanation,
        reading=verdict.reading,
    )


def _judge_batches(
    storage: Storage,
    judge: Judge,
    batches: list[list[Triple]],
    runtime: Runtime,
    folder: Path,
    on_event: OnEvent,
    is_proven: bool,
) -> dict:
    """Run one process for a server, engines for a model folder. Returns statistics."""
    pieces = tuple(
        JudgeBatch(out=f"{judge.folder}/{fingerprint([t.digest for t in batch])}.parquet", triples=tuple(batch))
        for batch in batches
    )
    setup = JudgeSetup(
        store=storage.uri(""), runtime=runtime, endpoint=judge.endpoint, limits=judge.limits, is_proven=is_proven
    )
    if isinstance(judge.endpoint, ServerEndpoint):
        job = EngineJob(setup=setup, pieces=pieces)
        children = [Child("judge", WorkerModule.JUDGING, job, folder)] if pieces else []
        heartbeat_timeout = runtime.heartbeat_timeout_minutes * 60
        usage = processes.run(children, len(children), lambda _, line: on_event(parse_event(line)), heartbeat_timeout)
        return dict(judges=len(children), **usage.summarize())
    engine_count = min(runtime.generate_workers, -(-len(pieces) // BATCHES_PER_ENGINE))
    work = EngineWork(
        name="judge",
        module=WorkerModule.JUDGING,
        setup=setup,
        pieces=pieces,
        cost=float(len(pieces)),
        folder=judge.endpoint.folder,
        digest=judge.model["digest"],
        children=engine_count,
        environment=engines.ONE_THREAD if engine_count > 1 else {},
    )
    statistics = engines.run([work], runtime, folder, on_event)
    return dict(judges=statistics["workers"]) | statistics
