"""score: a verdict on every response. A verdict that could not be had is a status, never a 0."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import PurePosixPath

from prefect import task

from masters.common.hashing import digest
from masters.config import Answers
from masters.config.stages import Stage
from masters.models.judging import batches
from masters.models.judging.batches import Judge
from masters.rewards import verifiers
from masters.rewards.verdict import Triple
from masters.store import artifacts, tables
from masters.store.artifacts import Artifact, External, Identity, Upstream
from masters.store.storage import Storage
from masters.tasks.build import STAGE, build_or_reuse
from masters.tasks.judges import Verdicts, check_any, counted, forget, judge_of, judged, judgement_files
from masters.tasks.progress import warn
from masters.tasks.run_context import Context, Round, Run

VERSION = 1
KEY = ("question_id", "source", "mask_ratio", "sample")

Asked = dict[str, Triple]  # by question_id, without a text


def identity(context: Context, current: Round, responses: Artifact) -> Identity:
    return attempts(context, current, responses)[-1]


def attempts(context: Context, current: Round, responses: Artifact) -> list[Identity]:
    """What was built and what comes next: verdicts with gaps are an input of the ones that fill them.

    So nothing that was trained on is overwritten, and a judge that was down is asked again by the next run.
    """
    chain = [first(context, current, [_stem(file) for file in responses.files("responses")])]
    while (found := _found(context, chain[-1], responses)) and found.facts["statuses"].get("judge_failed"):
        chain.append(replace(chain[0], inputs=chain[0].inputs | {"earlier": found.fingerprint}))
    return chain


def _found(context: Context, made_of: Identity, responses: Artifact) -> Artifact | None:
    return artifacts.find(context.storage, made_of, {"responses": responses})


def first(context: Context, current: Round, shards: list[str]) -> Identity:
    """Of verdicts that nothing came before."""
    judge = judge_of(context, current)
    config = _rules(context.config.answers) if judge is None else dict(judge=judge.name, **judge.identity)
    inputs = {f"shard-{name}": name for name in shards}
    return Identity(f"score{current.suffix}", VERSION, config, inputs, slug=context.config.name)


def _rules(answers: Answers) -> dict:
    """The rules' identity; `judge` is their name in the table."""
    decides = verifiers.identity(answers)
    return dict(judge=decides.pop("verifier"), **decides)


@task(name="score", task_run_name="score{current.suffix}", **STAGE)
def score(run: Run, current: Round, data: Artifact, responses: Artifact) -> Artifact:
    """Table `verdicts`, file for file beside `responses`; from an LLM also `judgements`, a row a distinct triple."""
    chain, judge, asked = attempts(run, current, responses), judge_of(run, current), batches.untold(data)
    if run.rebuilds(chain[0]):
        chain = chain[:1]
    said = cache(lambda: _said(run, chain[-1], judge, set(_triples(responses, asked))))
    made_of = chain[-1]
    here = not run.pool(Stage.SCORE)  # else the pool's worker asks the judge
    if here and len(chain) > 1 and not _found(run, made_of, responses) and not said()[1]["answered"]:
        made_of = chain[-2]  # the judge still cannot be had for these: what there is stays

    def build() -> tuple[dict[str, str], dict, dict]:
        verdicts, how = said()
        check_any(made_of.config["judge"], verdicts)
        files, statuses = _verdict_files(run.storage, made_of, responses, asked, verdicts)
        if judge:
            files |= judgement_files(run.storage, made_of, verdicts)
        rows = statuses.total()
        return files, dict(rows=rows, rejected=rows - statuses["ok"], statuses=dict(statuses)), how

    upstream = _upstream(run, current, data, responses, chain[: chain.index(made_of)])
    return _warn_missing_scores(run, build_or_reuse(run, made_of, upstream, build, lambda: forget(run.storage, judge)))


def _warn_missing_scores(run: Run, scored: Artifact) -> Artifact:
    """How many responses have no verdict, by status: in the stage's entry, and as a warning, built or reused."""
    lost = {status: count for status, count in sorted(scored.facts["statuses"].items()) if status != "ok"}
    if lost:
        entry, listed = run.stages[-1], counted(lost)
        entry["no_verdict"] = lost
        of = f"{sum(lost.values()):,} of {scored.facts['rows']:,} responses"
        warn(f"{entry['name']}: {of} have no verdict and get no reward ({listed})")
    return scored


def _upstream(run: Run, current: Round, data: Artifact, responses: Artifact, before: list[Identity]) -> Upstream:
    """What the verdicts come from: also the judge, and the verdicts whose gaps these fill."""
    upstream: dict[str, Artifact | External] = dict(data=data, responses=responses)
    if judge_of(run, current):
        upstream["judge"] = (run.ready.judge or current.teacher).origin
    if before and (earlier := artifacts.find(run.storage, before[-1])):
        upstream["earlier"] = earlier
    return upstream


def _said(run: Run, made_of: Identity, judge: Judge | None, triples: set[Triple]) -> tuple[Verdicts, dict]:
    """A verdict on each triple, and how it ran."""
    if judge is None:
        with verifiers.verifying(run.config.answers) as is_right:
            return {triple: verifiers.verdict(is_right, triple) for triple in triples}, dict(triples=len(triples))
    return judged(run, made_of, judge, triples)


def _triples(responses: Artifact, asked: Asked) -> Iterator[Triple]:
    for row in responses.rows("responses", ["question_id", "text"]):
        yield replace(asked[row["question_id"]], text=row["text"])


def _verdict_files(
    storage: Storage, made_of: Identity, responses: Artifact, asked: Asked, verdicts: Verdicts
) -> tuple[dict[str, str], Counter]:
    """The table's files with digests, and how many rows have which status."""
    files, statuses = {}, Counter()
    for name in responses.files("responses"):
        rows = []
        for row in tables.read(storage, name, [*KEY, "text"]).to_pylist():
            verdict = verdicts[replace(asked[row["question_id"]], text=row.pop("text"))]
            said = dict(score=verdict.score, status=verdict.status, explanation=verdict.explanation)
            rows.append(row | said | dict(judge=made_of.config["judge"]))
            statuses[verdict.status] += 1
        table = f"verdicts/{_stem(name)}.parquet"
        files[table] = _write(storage, made_of, table, tables.encode(rows, tables.VERDICTS))
    return files, statuses


def _write(storage: Storage, made_of: Identity, name: str, data: bytes) -> str:
    storage.write(f"{made_of.folder}/{name}", data)
    return digest(data)


def _stem(name: str) -> str:
    return PurePosixPath(name).stem
