"""evaluate: accuracy of teachers, student before and student after on the split `evaluate.split`, decoded greedily."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from prefect import task

from masters.checks.model_folder import STUDENT_BEFORE, LocalModel
from masters.checks.preflight import Resources
from masters.common.errors import WorkerError
from masters.config import Config, Sampling
from masters.data import question_shards
from masters.evaluation.statistics import clustered_standard_error
from masters.models.generation.shards import GeneratingModel, ShardRequest, collect_shards, find_missing
from masters.models.judging.batches import Judge, read_questions
from masters.rewards import verifiers
from masters.rewards.verdict import Triple
from masters.store import tables
from masters.store.artifacts import Artifact, External, Identity
from masters.tasks import judges
from masters.tasks.build_or_reuse import TASK_OPTIONS, StageResult, build_or_reuse
from masters.tasks.generation_stage import delete_shards, generate_shards, too_long_facts, warn_too_long
from masters.tasks.progress import warn
from masters.tasks.run_context import Context, Round, Run

VERSION = 3  # 2: standard errors are clustered by image; 3: answers are verified here, not by the engines

IsCorrect = Callable[[str, str], bool]  # (question_id, response text) -> whether the response is correct


def prefetch(context: Context, current: Round, data: Artifact) -> list[ShardRequest]:
    """Request the predictions of the round's teacher and of the initial student, which no training changes."""
    models = [current.teacher, *([initial_student(context.resources)] if current.number == 1 else [])]
    return prediction_requests(context, data, models)


def initial_student(resources: Resources) -> LocalModel:
    """Return the student before training, under its name in the predictions table."""
    return replace(resources.student, name=STUDENT_BEFORE)


def prediction_requests(context: Context, data: Artifact, models: list[LocalModel]) -> list[ShardRequest]:
    """Request one prediction of each model for every question of the split."""
    refs = question_shards.read_refs(data, context.config.evaluate.split)
    requests: list[ShardRequest] = []
    for model in {model.name: model for model in models}.values():  # a chain may name a teacher twice
        generating_model = GeneratingModel(model.name, model.folder, model.digest)
        template = ShardRequest(generating_model, "predictions", "evaluation", greedy_sampling(context.config))
        requests += context.shard_cache.plan_requests(template, refs)
    return requests


def greedy_sampling(config: Config) -> Sampling:
    """Return the sampling settings of an evaluation: greedy, with the configured length and data type."""
    return Sampling.greedy(config.generate.max_tokens, config.generate.dtype)


def make_identity(context: Context, requests: list[ShardRequest], name: str = "evaluate") -> Identity:
    inputs = {f"shard-{request.fingerprint}": request.fingerprint for request in requests}
    if judge := judges.evaluation_judge(context):
        config = dict(judge=judge.name, **judge.identity)
    else:
        config = verifiers.verifier_identity(context.config.answers)
    return Identity(name, VERSION, config, inputs, slug=context.config.name)


@task(name="evaluate", task_run_name="{name}", **TASK_OPTIONS)
def evaluate(run: Run, data: Artifact, models: list[LocalModel], name: str = "evaluate") -> Artifact:
    """Build the table `predictions`; with an LLM judge also `judgements`, with a row for each triple.

    The fact `scores` holds each model's `accuracy`, `n`, and `standard_error` clustered by image.

    `name` is the stage's name, a different one for a second evaluation in a run. Raises WorkerError if the judge was
    unavailable for some answers.
    """
    requests, judge = prediction_requests(run, data, models), judges.evaluation_judge(run)
    identity = make_identity(run, requests, name)

    def build() -> StageResult:
        if judge and find_missing(run.storage, requests):
            judges.ask_judge_first(run)
        execution = generate_shards(run, identity, data, requests)
        with _grade(run, identity, data, requests, judges.evaluation_judge(run)) as grading:
            files = collect_shards(run.storage, identity, requests, partial(add_correctness, grading.is_correct))
        correct = _read_correctness(run, identity, files)
        columns = data.rows("questions", ["question_id", "image_digest"])
        images = {row["question_id"]: row["image_digest"] for row in columns}
        scores = {model: accuracy_score(by_question, images) for model, by_question in correct.items()}
        rows = sum(len(by_question) for by_question in correct.values())
        facts = dict(rows=rows, scores=scores) | grading.facts | too_long_facts(run.storage, requests)
        return StageResult(files | grading.files, facts, execution | grading.execution)

    upstream: dict[str, Artifact | External] = {"data": data}
    upstream |= {f"model {model.name}": model.origin for model in models}
    if run.resources.judge and judge:
        upstream["judge"] = run.resources.judge.origin
    evaluated = build_or_reuse(run, identity, upstream, build, lambda: _delete_stored(run, requests, judge))
    _warn_unjudged(run, evaluated)
    warn_too_long(run, identity, evaluated, "they count as wrong")
    return evaluated


def _delete_stored(run: Run, requests: list[ShardRequest], judge: Judge | None) -> None:
    delete_shards(run.storage, requests)
    judges.delete_judgements(run.storage, judge)


@dataclass(frozen=True)
class Grading:
    """The decision which answers are correct, with what a judge adds to the stage's result."""

    is_correct: IsCorrect
    files: dict[str, str] = field(default_factory=dict)
    facts: dict = field(default_factory=dict)
    execution: dict = field(default_factory=dict)


@contextmanager
def _grade(
    run: Run, identity: Identity, data: Artifact, requests: list[ShardRequest], judge: Judge | None
) -> Iterator[Grading]:
    """Yield the grading of the answers in the shards: by the judge, which is run here, or by the verifier."""
    if judge is not None:
        yield _grade_by_judge(run, identity, data, requests, judge)
        return
    rows = data.rows("questions", ["question_id", "accepted_answers"])
    accepted = {row["question_id"]: row["accepted_answers"] for row in rows}
    with verifiers.open_verifier(run.config.answers) as is_right:
        yield Grading(lambda question_id, text: is_right(text, accepted[question_id]))


def _grade_by_judge(
    run: Run, identity: Identity, data: Artifact, requests: list[ShardRequest], judge: Judge
) -> Grading:
    """Have the judge grade all answers.

    An answer that the judge refuses, or whose verdict cannot be parsed, counts as wrong and is reported. Raises
    WorkerError if the judge was unavailable for some answers; the next run reuses the verdicts that it gave.
    """
    questions, answers = read_questions(data), Counter[Triple]()
    for request in requests:
        table = tables.read(run.storage, request.file, ["question_id", "text", "finish_reason"])
        for row in table.to_pylist():
            if row["finish_reason"] != tables.PROMPT_TOO_LONG:
                answers[replace(questions[row["question_id"]], text=row["text"])] += 1
    verdicts, execution = judges.run_judge(run, identity, judge, list(answers))
    judges.check_any_verdict(judge.name, verdicts)
    statuses = Counter[str]()
    for triple, count in answers.items():
        statuses[verdicts[triple].status] += count
    if unavailable := statuses["judge_failed"]:
        raise WorkerError(
            f"{identity.stage}: judge {judge.name} was unavailable for {unavailable:,} of {answers.total():,} answers, "
            "and the accuracy on the others would not be comparable; run again to judge the missing ones"
        )

    def is_correct(question_id: str, text: str) -> bool:
        return verdicts[replace(questions[question_id], text=text)].score == 1.0

    without_verdict = {status: count for status, count in statuses.items() if status != "ok"}
    files = judges.write_judgements(run.storage, identity, verdicts)
    return Grading(is_correct, files, {"no_verdict": without_verdict} if without_verdict else {}, execution)


def _warn_unjudged(run: Run, evaluated: Artifact) -> None:
    """Report the answers without a verdict in the stage's entry and in a warning."""
    if without_verdict := evaluated.facts.get("no_verdict"):
        entry = run.stages[-1]
        entry["no_verdict"] = without_verdict
        counts = judges.format_counts(without_verdict)
        warn(f"{entry['name']}: answers without a verdict count as wrong ({counts})")


def add_correctness(is_correct: IsCorrect, shard: bytes) -> bytes:
    """Convert a shard of answers to a file of `predictions`. A prompt that was too long is never correct."""
    rows = tables.decode(shard, tables.PREDICTED.names).to_pylist()
    for row in rows:
        was_asked = row["finish_reason"] != tables.PROMPT_TOO_LONG
        row["correct"] = was_asked and is_correct(row["question_id"], row["text"])
    return tables.encode(rows, tables.PREDICTIONS)


def accuracy_score(correct: dict[str, bool], images: dict[str, str]) -> dict[str, float]:
    """Return the accuracy, its number of questions `n`, and its standard error clustered by image.

    `correct` and `images` are by question_id; `images` holds image digests.
    """
    accuracy = sum(correct.values()) / len(correct)
    error = clustered_standard_error(list(correct.values()), [images[question_id] for question_id in correct])
    return dict(accuracy=accuracy, n=len(correct), standard_error=error)


def _read_correctness(run: Run, identity: Identity, files: Collection[str]) -> dict[str, dict[str, bool]]:
    """Read by model and question_id whether the prediction is correct."""
    correct: dict[str, dict[str, bool]] = {}
    for name in files:
        if name.startswith("predictions/"):
            table = tables.read(run.storage, f"{identity.folder}/{name}", ["model", "question_id", "correct"])
            for row in table.to_pylist():
                correct.setdefault(row["model"], {})[row["question_id"]] = row["correct"]
    return correct
