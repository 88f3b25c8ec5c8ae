"""Has a judge give verdicts: each distinct triple once, ever; what it said before is read from the store.

What a judge said lies at `shards/judgements/<fingerprint of the judge>/*.parquet`, a file a batch asked. Batches are
planned by the triples' digests, over all of them, so that a run cut short goes on with the batches it had. Only
final verdicts are kept: a judge that could not be had is asked again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from masters.common.hashing import fingerprint
from masters.config import Runtime
from masters.data.question_shards import split
from masters.execution import engines, processes
from masters.rewards import judge_prompts
from masters.rewards.verdict import Triple, Verdict
from masters.store import tables
from masters.store.artifacts import Artifact
from masters.store.storage import Storage

JUDGES = "masters.models.judging.worker"
VERSION = 1  # of how judges are asked; a new one asks everything anew
BATCH = 512  # triples an engine judges together
ENGINE_BATCHES = 4  # a further engine is worth its start from this many batches each


@dataclass(frozen=True)
class Judge:
    """An LLM that judges: its name in tables, what shapes its verdicts, and how a process reaches it."""

    name: str
    model: dict  # literals: digest of a folder and data type, or a server's URL and model
    reach: dict  # never part of identity

    @property
    def identity(self) -> dict:
        tokens = dict(explanation=judge_prompts.EXPLANATION_TOKENS, score=judge_prompts.SCORE_TOKENS)
        sampling = dict(temperature=0, max_tokens=tokens)
        return dict(version=VERSION, prompts=judge_prompts.VERSION, sampling=sampling, model=self.model)

    @property
    def folder(self) -> str:
        """Where the store keeps what this judge said."""
        return f"shards/judgements/{fingerprint(self.identity)}"


def untold(data: Artifact) -> dict[str, Triple]:
    """Question and accepted answers by question_id, as triples whose text is still to come."""
    columns = ["question_id", "question", "answer", "accepted_answers"]
    return {
        row["question_id"]: Triple(row["question"], row["answer"], "", tuple(row["accepted_answers"][1:]))
        for row in data.rows("questions", columns)
    }


def stored_verdicts(storage: Storage, judge: Judge, triples: list[Triple]) -> dict[Triple, Verdict]:
    """Verdicts that the judge gave earlier on some of these triples."""
    wanted, found = {triple.digest: triple for triple in triples}, {}
    columns = ["triple_digest", "score", "status", "explanation", "reading"]
    for name in storage.names(judge.folder):
        for row in tables.read(storage, name, columns).to_pylist():
            if triple := wanted.get(row.pop("triple_digest")):
                found.setdefault(triple, Verdict(**row))
    return found


def stored_verdict_digests(storage: Storage, folder: str) -> set[str]:
    """Of the triples that a judge gave verdicts on earlier; `folder` is the judge's."""
    columns = ["triple_digest"]
    return {d for name in storage.names(folder) for d in tables.read(storage, name, columns)[0].to_pylist()}


def start_early_judging(
    data: Artifact, judge: Judge, shards: list[str], runtime: Runtime, folder: Path
) -> processes.Child | None:
    """A process that asks a server about shards of responses as engines finish them; None for a judge of our own.

    An engine would take the processor from those that answer; a server has its own. What the process judges is found
    by `fulfil`.
    """
    if "url" not in judge.reach:
        return None
    job = dict(
        store=data.storage.uri(""), data=data.folder, responses="shards/responses", shards=shards, folder=judge.folder,
        reach=judge.reach, runtime=runtime.model_dump(),
    )  # fmt: skip
    return processes.Child("judge-ahead", "masters.models.judging.ahead_worker", job, folder, {})


def run_judging(
    storage: Storage,
    judge: Judge,
    triples: list[Triple],
    runtime: Runtime,
    folder: Path,
    on_progress: Callable[[int, int], None],
) -> tuple[dict[Triple, Verdict], dict]:
    """A verdict on every triple, and how it ran: `asked` now, `answered` of these, the processes it took."""
    ordered = sorted(triples, key=lambda triple: triple.digest)
    before = stored_verdicts(storage, judge, ordered)
    parts = [[t for t in part if t not in before] for _, part in split(ordered, BATCH)]
    asked = {triple.digest: triple for part in parts for triple in part}
    done, others = 0, {}

    def follow(_: str, line: dict) -> None:
        nonlocal done
        done += line.get("triples", 0)
        for triple, status, reason in line.get("others", []):
            others[asked[triple]] = Verdict(None, status, reason)
        on_progress(done, len(asked))

    on_progress(0, len(asked))
    how = _ask(storage, judge, [part for part in parts if part], runtime, folder, follow)
    verdicts = others | (stored_verdicts(storage, judge, ordered) if asked else before)
    how = dict(triples=len(triples), asked=len(asked), answered=len(asked) - len(others)) | how
    return verdicts, how


def row(triple: Triple, verdict: Verdict) -> dict:
    """Row of the judgements table."""
    return dict(
        triple_digest=triple.digest, question=triple.question, reference=triple.reference, text=triple.text,
        score=verdict.score, status=verdict.status, explanation=verdict.explanation, reading=verdict.reading,
    )  # fmt: skip


def _ask(
    storage: Storage,
    judge: Judge,
    parts: list[list[Triple]],
    runtime: Runtime,
    folder: Path,
    follow: Callable[[str, dict], None],
) -> dict:
    """One process for a server, engines for a model of ours; how it ran."""
    pieces = [
        dict(
            out=f"{judge.folder}/{fingerprint([t.digest for t in part])}.parquet",
            triples=[triple.to_json() for triple in part],
        )
        for part in parts
    ]
    setup, module = dict(store=storage.uri(""), reach=judge.reach, runtime=runtime.model_dump()), JUDGES
    if "url" in judge.reach:
        children = [processes.Child("judge", module, setup | dict(pieces=pieces), folder, {})] if pieces else []
        ran = processes.run(children, len(children), follow, runtime.heartbeat_timeout_minutes * 60)
        return dict(judges=len(children), **ran.told())
    children = min(runtime.generate_workers, -(-len(pieces) // ENGINE_BATCHES))
    work = engines.Work(
        name="judge", module=module, setup=setup, pieces=pieces, cost=float(len(pieces)),
        folder=judge.reach["folder"], digest=judge.model["digest"], children=children,
        environment=engines.ONE_THREAD if children > 1 else {},
    )  # fmt: skip
    how = engines.run([work], runtime, folder, follow)
    return dict(judges=how["workers"]) | how
