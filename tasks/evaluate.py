"""evaluate: teachers, student before and student after on the split `evaluate.split`, greedy, through vLLM."""

from collections.abc import Collection
from dataclasses import replace
from functools import partial

from prefect import task

from masters.checks.model_folder import BEFORE, LocalModel
from masters.checks.preflight import Ready
from masters.config import Config
from masters.data import question_shards
from masters.evaluation.statistics import clustered_standard_error
from masters.models.generation.shards import NO_SHARD, Answerer, Order
from masters.rewards import verifiers
from masters.rewards.verifiers import AnyOf
from masters.store import tables
from masters.store.artifacts import Artifact, Identity
from masters.tasks.build import STAGE, build_or_reuse
from masters.tasks.generation_stage import answered, forget, set_aside, tell_set_aside
from masters.tasks.run_context import Context, Round, Run

VERSION = 3  # 2: standard errors are clustered by image; 3: answers are verified here, not by the engines
COLUMNS = ["question_id", "image_digest", "accepted_answers"]
GREEDY = dict(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0, seed=0)


def ahead(context: Context, current: Round, data: Artifact) -> list[Order]:
    """What is asked of a round's teacher and of the student as it came: known before anything is trained."""
    models = [current.teacher, *([before(context.ready)] if current.number == 1 else [])]
    return orders(context, data, models)


def before(ready: Ready) -> LocalModel:
    """The student as it came, under its name in the predictions table."""
    return replace(ready.student, name=BEFORE)


def orders(context: Context, data: Artifact, models: list[LocalModel]) -> list[Order]:
    sampling = sampling_of(context.config)
    refs, asked = question_shards.references(data, context.config.evaluate.split), []
    for m in {m.name: m for m in models}.values():  # a chain may name a teacher twice
        answerer = Answerer(m.name, m.folder, m.digest, {})
        order = Order(answerer, NO_SHARD, "predictions", "evaluation", None, 0, 1, sampling)
        asked += context.earlier.orders(order, refs)
    return asked


def sampling_of(config: Config) -> dict:
    """How models are asked: greedy, within the configuration's length and data type."""
    return GREEDY | dict(max_tokens=config.generate.max_tokens, dtype=config.generate.dtype)


def identity(context: Context, asked: list[Order], name: str = "evaluate") -> Identity:
    inputs = {f"shard-{order.fingerprint}": order.fingerprint for order in asked}
    return Identity(name, VERSION, verifiers.identity(context.config.answers), inputs, slug=context.config.name)


@task(name="evaluate", task_run_name="{name}", **STAGE)
def evaluate(run: Run, data: Artifact, models: list[LocalModel], name: str = "evaluate") -> Artifact:
    """Table `predictions`; facts `scores`: per model `accuracy` by the configuration's verifier, `n`, and
    `standard_error`, clustered by image.

    `name`: of the stage, another one where a run evaluates twice.
    """
    asked = orders(run, data, models)
    made_of = identity(run, asked, name)

    def build() -> tuple[dict[str, str], dict, dict]:
        questions = {row.pop("question_id"): row for row in data.rows("questions", COLUMNS)}
        accepted = {question: row["accepted_answers"] for question, row in questions.items()}
        with verifiers.verifying(run.config.answers) as is_right:
            files, how = answered(run, made_of, data, asked, completed=partial(verified, is_right, accepted))
        right = _right(run, made_of, files)
        images = {question: row["image_digest"] for question, row in questions.items()}
        scores = {model: score(hits, images) for model, hits in right.items()}
        rows = sum(len(hits) for hits in right.values())
        return files, dict(rows=rows, scores=scores) | set_aside(run.storage, asked), how

    upstream = {"data": data} | {f"model {model.name}": model.origin for model in models}
    made = build_or_reuse(run, made_of, upstream, build, lambda: forget(run.storage, asked))
    return tell_set_aside(run, made_of, made, "they count as wrong")


def verified(is_right: AnyOf, accepted: dict[str, list[str]], shard: bytes) -> bytes:
    """A file of `predictions` from a shard that an engine answered."""
    rows = tables.decode(shard, tables.PREDICTED.names).to_pylist()
    for row in rows:
        asked = row["finish_reason"] != tables.PROMPT_TOO_LONG  # what was not asked is not right, whatever is accepted
        row["correct"] = asked and is_right(row["text"], accepted[row["question_id"]])
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
