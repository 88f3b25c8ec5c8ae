"""score: give every response a verdict. A verdict that could not be obtained is a status, never a score of 0.

A judge that was unavailable leaves gaps. The next run fills them in a further scoring pass, whose artifact has the
previous pass as an input: verdicts that a student was trained on are never overwritten.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import PurePosixPath

from prefect import task

from masters.common.errors import ArtifactError
from masters.config import Answers
from masters.config.stages import Stage
from masters.models.judging import batches
from masters.models.judging.batches import Judge
from masters.rewards import verifiers
from masters.rewards.verdict import Triple
from masters.store import artifacts, tables
from masters.store.artifacts import Artifact, External, Identity, Upstream
from masters.store.storage import Storage
from masters.tasks.build_or_reuse import TASK_OPTIONS, StageResult, build_or_reuse, write_file
from masters.tasks.judges import (
    Verdicts,
    check_any_verdict,
    delete_judgements,
    format_counts,
    run_judge,
    scoring_judge,
    write_judgements,
)
from masters.tasks.progress import warn
from masters.tasks.run_context import Context, Round, Run
from masters.tasks.training_signal import QuestionVerdicts, Shares

VERSION = 1
KEY = ("question_id", "source", "mask_ratio", "sample")

QuestionTriples = dict[str, Triple]  # by question_id, each with an empty response text


def make_identity(context: Context, current: Round, responses: Artifact) -> Identity:
    """Return the identity of the scoring pass that a run would find or build next."""
    return scoring_passes(context, current, responses)[-1]


def scoring_passes(context: Context, current: Round, responses: Artifact) -> list[Identity]:
    """List the scoring passes over these responses: every built pass with gaps, and the pass after them.

    The last pass is complete, or not built yet.
    """
    first = first_pass(context, current, [_stem(file) for file in responses.files("responses")])
    passes = [first]
    while (scored := _find_pass(context, passes[-1], responses)) and scored.facts["statuses"].get("judge_failed"):
        passes.append(replace(first, inputs=first.inputs | {"earlier": scored.fingerprint}))
    return passes


def first_pass(context: Context, current: Round, shards: list[str]) -> Identity:
    """Return the identity of the first scoring pass over the responses in these shards."""
    judge = scoring_judge(context, current)
    config = _verifier_identity(context.config.answers) if judge is None else dict(judge=judge.name, **judge.identity)
    inputs = {f"shard-{name}": name for name in shards}
    return Identity(f"score{current.suffix}", VERSION, config, inputs, slug=context.config.name)


def _find_pass(context: Context, identity: Identity, responses: Artifact) -> Artifact | None:
    """Return a built pass. A damaged one counts as not built: what reuses it reports it, and a rebuild replaces it."""
    try:
        return artifacts.find(context.storage, identity, {"responses": responses})
    except ArtifactError:
        return None


def _verifier_identity(answers: Answers) -> dict:
    """Return the identity of the rules that score instead of a judge; `judge` is their name in the verdicts table."""
    identity = verifiers.verifier_identity(answers)
    return dict(judge=identity.pop("verifier"), **identity)


@task(name="score", task_run_name="score{current.suffix}", **TASK_OPTIONS)
def score(run: Run, current: Round, data: Artifact, responses: Artifact) -> Artifact:
    """Build the table `verdicts`, one file for each file of `responses`.

    With an LLM judge also the table `judgements`, with one row for each distinct triple of question, reference answer
    and response text.
    """
    judge, questions = scoring_judge(run, current), batches.read_questions(data)
    passes = scoring_passes(run, current, responses)
    if run.must_rebuild(passes[0]):
        passes = passes[:1]

    @cache
    def get_verdicts() -> tuple[Verdicts, dict]:
        return _get_verdicts(run, passes[-1], judge, set(_read_triples(responses, questions)))

    is_new_follow_up = len(passes) > 1 and _find_pass(run, passes[-1], responses) is None
    if is_new_follow_up and not run.pool_for(Stage.SCORE) and not get_verdicts()[1]["answered"]:
        passes.pop()  # the judge is still unavailable: keep the pass with its gaps
    identity = passes[-1]

    def build() -> StageResult:
        verdicts, execution = get_verdicts()
        check_any_verdict(identity.config["judge"], verdicts)
        files, statuses, signal = _write_verdicts(run.storage, identity, responses, questions, verdicts)
        if judge:
            files |= write_judgements(run.storage, identity, verdicts)
        rows = statuses.total()
        facts = dict(rows=rows, rejected=rows - statuses["ok"], statuses=dict(statuses), signal=signal)
        return StageResult(files, facts, execution)

    upstream = _upstream(run, current, data, responses, passes[:-1])
    scored = build_or_reuse(run, identity, upstream, build, lambda: delete_judgements(run.storage, judge))
    _warn_missing_verdicts(run, scored)
    return scored


def _warn_missing_verdicts(run: Run, scored: Artifact) -> None:
    """Count the responses without a verdict by status, in the stage's entry and in a warning."""
    missing = {status: count for status, count in sorted(scored.facts["statuses"].items()) if status != "ok"}
    if missing:
        entry = run.stages[-1]
        entry["no_verdict"] = missing
        share = f"{sum(missing.values()):,} of {scored.facts['rows']:,} responses"
        warn(f"{entry['name']}: {share} have no verdict and get no reward ({format_counts(missing)})")


def _upstream(
    run: Run, current: Round, data: Artifact, responses: Artifact, previous_passes: list[Identity]
) -> Upstream:
    """Collect what the verdicts are made from, with the judge and the pass whose gaps are filled."""
    upstream: dict[str, Artifact | External] = dict(data=data, responses=responses)
    if scoring_judge(run, current):
        upstream["judge"] = (run.resources.judge or current.teacher).origin
    if previous_passes and (previous := artifacts.find(run.storage, previous_passes[-1])):
        upstream["earlier"] = previous
    return upstream


def _get_verdicts(run: Run, identity: Identity, judge: Judge | None, triples: set[Triple]) -> tuple[Verdicts, dict]:
    """Return a verdict on each triple, by the judge or by the rules, and how the judging ran."""
    if judge is not None:
        return run_judge(run, identity, judge, triples)
    with verifiers.open_verifier(run.config.answers) as is_right:
        return {triple: verifiers.make_verdict(is_right, triple) for triple in triples}, dict(triples=len(triples))


def _read_triples(responses: Artifact, questions: QuestionTriples) -> Iterator[Triple]:
    for row in responses.rows("responses", ["question_id", "text"]):
        yield replace(questions[row["question_id"]], text=row["text"])


def _write_verdicts(
    storage: Storage, identity: Identity, responses: Artifact, questions: QuestionTriples, verdicts: Verdicts
) -> tuple[dict[str, str], Counter, Shares]:
    """Write the table `verdicts`. Returns SHA-256 by file name, the number of rows by status, and the signal."""
    files, statuses, by_question = {}, Counter(), QuestionVerdicts()
    for shard in responses.files("responses"):
        rows = []
        for row in tables.read(storage, shard, [*KEY, "text"]).to_pylist():
            verdict = verdicts[replace(questions[row["question_id"]], text=row.pop("text"))]
            scored = dict(score=verdict.score, status=verdict.status, explanation=verdict.explanation)
            rows.append(row | scored | dict(judge=identity.config["judge"]))
            statuses[verdict.status] += 1
            by_question.add(row["question_id"], verdict.score)
        files |= write_file(storage, identity, f"verdicts/{_stem(shard)}.parquet", tables.encode(rows, tables.VERDICTS))
    return files, statuses, by_question.shares


def _stem(name: str) -> str:
    return PurePosixPath(name).stem
