"""evaluate: teachers, student before and student after on the split `evaluate.split`, greedy, through vLLM."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from prefect import task

from masters.checks.model_folder import BEFORE, LocalModel
from masters.checks.preflight import Ready
from masters.common.errors import WorkerError
from masters.config import Config
from masters.data import question_shards
from masters.evaluation.statistics import clustered_standard_error
from masters.models.generation.shards import NO_SHARD, GeneratingModel, ShardRequest, collect_shards
from masters.models.judging.batches import Judge, untold
from masters.rewards import verifiers
from masters.rewards.verdict import Triple
from masters.store import tables
from masters.store.artifacts import Artifact, External, Identity
from masters.tasks import judges
from masters.tasks.build import STAGE, build_or_reuse
from masters.tasks.generation_stage import answer, forget, set_aside, tell_set_aside
from masters.tasks.progress import warn
from masters.tasks.run_context import Context, Round, Run

VERSION = 3  # 2: standard errors are clustered by image; 3: answers are verified here, not by the engines
COLUMNS = ["question_id", "image_digest"]
NOT_ASKED = tables.PROMPT_TOO_LONG  # finish_reason: what was not asked is not right, whatever is accepted
GREEDY = dict(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0, seed=0)


def prefetch(context: Context, current: Round, data: Artifact) -> list[ShardRequest]:
    """What is asked of a round's teacher and of the student as it came: known before anything is trained."""
    models = [current.teacher, *([before(context.ready)] if current.number == 1 else [])]
    return orders(context, data, models)


def before(ready: Ready) -> LocalModel:
    """The student as it came, under its name in the predictions table."""
    return replace(ready.student, name=BEFORE)


def orders(context: Context, data: Artifact, models: list[LocalModel]) -> list[ShardRequest]:
    sampling = sampling_of(context.config)
    refs, asked = question_shards.references(data, context.config.evaluate.split), []
    for m in {m.name: m for m in models}.values():  # a chain may name a teacher twice
        answerer = GeneratingModel(m.name, m.folder, m.digest, {})
        order = ShardRequest(answerer, NO_SHARD, "predictions", "evaluation", None, 0, 1, sampling)
        asked += context.earlier.orders(order, refs)
    return asked


def sampling_of(config: Config) -> dict:
    """How models are asked: greedy, within the configuration's length and data type."""
    return GREEDY | dict(max_tokens=config.generate.max_tokens, dtype=config.generate.dtype)


def identity(context: Context, asked: list[ShardRequest], name: str = "evaluate") -> Identity:
    inputs = {f"shard-{order.fingerprint}": order.fingerprint for order in asked}
    judge = judges.evaluation_judge(context)
    decides = verifiers.identity(context.config.answers) if judge is None else dict(judge=judge.name, **judge.identity)
    return Identity(name, VERSION, decides, inputs, slug=context.config.name)


@task(name="evaluate", task_run_name="{name}", **STAGE)
def evaluate(run: Run, data: Artifact, models: list[LocalModel], name: str = "evaluate") -> Artifact:
    """Table `predictions`; facts `scores`: per model `accuracy` by verifier or judge, `n`, and `standard_error`,
    clustered by image. From an LLM also `judgements`, a row a distinct triple.

    `name`: of the stage, another one where a run evaluates twice. Raises WorkerError where a judge could not be had.
    """
    asked, judge = orders(run, data, models), judges.evaluation_judge(run)
    made_of = identity(run, asked, name)

    def build() -> tuple[dict[str, str], dict, dict]:
        questions = {row.pop("question_id"): row for row in data.rows("questions", COLUMNS)}
        how = answer(run, made_of, data, asked)
        with _deciding(run, made_of, data, asked, judge) as decided:
            files = collect_shards(run.storage, made_of, asked, completed=partial(verified, decided.is_right))
        right = _right(run, made_of, files)
        images = {question: row["image_digest"] for question, row in questions.items()}
        scores = {model: score(hits, images) for model, hits in right.items()}
        rows = sum(len(hits) for hits in right.values())
        facts = dict(rows=rows, scores=scores) | decided.facts | set_aside(run.storage, asked)
        return files | decided.files, facts, how | decided.how

    upstream: dict[str, Artifact | External] = {"data": data}
    upstream |= {f"model {model.name}": model.origin for model in models}
    if run.ready.judge and judge:
        upstream["judge"] = run.ready.judge.origin
    made = build_or_reuse(run, made_of, upstream, build, lambda: _forget(run, asked, judge))
    _tell_unjudged(run, made)
    return tell_set_aside(run, made_of, made, "they count as wrong")


def _forget(run: Run, asked: list[ShardRequest], judge: Judge | None) -> None:
    forget(run.storage, asked)
    judges.forget(run.storage, judge)


Correct = Callable[[str, str], bool]  # whether a question, by its id, is answered by a text


@dataclass(frozen=True)
class Decided:
    """Which answers are right, and what a judge adds to the artifact: files by digest, facts, how it ran."""

    is_right: Correct
    files: dict[str, str] = field(default_factory=dict)
    facts: dict = field(default_factory=dict)
    how: dict = field(default_factory=dict)


@contextmanager
def _deciding(
    run: Run, made_of: Identity, data: Artifact, asked: list[ShardRequest], judge: Judge | None
) -> Iterator[Decided]:
    """What decides on the answers that lie in the shards of `asked`: rules, or a judge, who is asked here."""
    if judge is not None:
        yield _judged(run, made_of, data, asked, judge)
        return
    rows = data.rows("questions", ["question_id", "accepted_answers"])
    accepted = {row["question_id"]: row["accepted_answers"] for row in rows}
    with verifiers.verifying(run.config.answers) as is_right:
        yield Decided(lambda question, text: is_right(text, accepted[question]))


def _judged(run: Run, made_of: Identity, data: Artifact, asked: list[ShardRequest], judge: Judge) -> Decided:
    """The judge's verdicts on all answers. Raises WorkerError if it could not be had for some: a run that goes on has
    what it said until then.

    An answer that it cannot take, or on which its score cannot be read, is final: it counts as wrong, and is told.
    """
    questions, given = untold(data), Counter[Triple]()
    for order in asked:
        table = tables.read(run.storage, order.file, ["question_id", "text", "finish_reason"])
        for row in table.to_pylist():
            if row["finish_reason"] != NOT_ASKED:
                given[replace(questions[row["question_id"]], text=row["text"])] += 1
    verdicts, how = judges.judged(run, made_of, judge, list(given))
    judges.check_any(judge.name, verdicts)
    lost = Counter[str]()
    for triple, count in given.items():
        lost[verdicts[triple].status] += count
    del lost["ok"]
    if missing := lost["judge_failed"]:
        raise WorkerError(
            f"{made_of.stage}: judge {judge.name} could not be had for {missing:,} of {given.total():,} answers, and "
            "accuracy on the others alone would be another number; run again: it is asked for what is missing"
        )

    def is_right(question: str, text: str) -> bool:
        return verdicts[replace(questions[question], text=text)].score == 1.0

    files = judges.judgement_files(run.storage, made_of, verdicts)
    return Decided(is_right, files, {"no_verdict": dict(lost)} if lost else {}, how)


def _tell_unjudged(run: Run, evaluated: Artifact) -> None:
    """Counts of answers without a verdict in the stage's entry and a warning, built or reused."""
    if lost := evaluated.facts.get("no_verdict"):
        run.stages[-1]["no_verdict"] = lost
        warn(f"{run.stages[-1]['name']}: answers without a verdict count as wrong ({judges.counted(lost)})")


def verified(is_right: Correct, shard: bytes) -> bytes:
    """A file of `predictions` from a shard that an engine answered."""
    rows = tables.decode(shard, tables.PREDICTED.names).to_pylist()
    for row in rows:
        row["correct"] = row["finish_reason"] != NOT_ASKED and is_right(row["question_id"], row["text"])
    return tables.encode(rows, tables.PREDICTIONS)


def score(right: dict[str, bool], images: dict[str, str]) -> dict[str, float]:
    """Accuracy on n questions and its standard error, which is clustered by image. `images`: of each question."""
    accuracy = sum(right.values()) / len(right)
    error = clustered_standard_error(list(right.values()), [images[question] for question in right])
    return dict(accuracy=accuracy, n=len(right), standard_error=error)


def _right(run: Run, made_of: Identity, files: Collection[str]) -> dict[str, dict[str, bool]]:
    """By model and question: whether the answer was right."""
    right: dict[str, dict[str, bool]] = {}
    for name in files:
        if name.startswith("predictions/"):
            table = tables.read(run.storage, f"{made_of.folder}/{name}", ["model", "question_id", "correct"])
            for row in table.to_pylist():
                right.setdefault(row["model"], {})[row["question_id"]] = row["correct"]
    return right
