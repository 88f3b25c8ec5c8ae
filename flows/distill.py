"""The whole pipeline on one page: data, mask, generate, score, train, evaluate, register; a round a teacher."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from prefect import Flow, State, flow
from prefect.client.schemas.objects import FlowRun
from prefect.runtime import flow_run

from masters.checks.model_folder import LocalModel
from masters.checks.preflight import preflight
from masters.common.errors import StoreError
from masters.config import Config
from masters.config.allowlist import check_config
from masters.config.stages import Stage
from masters.flows.retries import flow_attempt, retry_unreachable
from masters.flows.summary import Summary
from masters.store.artifacts import Artifact
from masters.store.storage import Storage
from masters.tasks import work_pools
from masters.tasks.data import data
from masters.tasks.evaluate import initial_student, evaluate, prefetch
from masters.tasks.generate import generate
from masters.tasks.mask import mask
from masters.tasks.progress import warn
from masters.tasks.refresh import first_part, next_part, keep_student_engine
from masters.tasks.register import register
from masters.tasks.report import report_run
from masters.tasks.run_context import Context, Round, Run
from masters.tasks.score import score
from masters.tasks.train import Inputs, train
from masters.tracking.locations import tracking_uri
from masters.tracking.open_runs import close_lost, close_of
from masters.tracking.run_writer import RunWriter


def close_crashed_run(flow: Flow, flow_run: FlowRun, state: State) -> None:
    """Runs in the worker: nothing of a run whose process is gone is left RUNNING in MLflow, wherever it ran."""
    config = Config.model_validate(flow_run.parameters["config"])
    check_config(config)  # a run that was refused touches nothing at its end either
    storage = Storage(config.store.root)
    uri = tracking_uri(config, storage)
    close_of(uri, storage, str(flow_run.id))
    close_lost(uri, storage)


@flow(name="distill", flow_run_name="{config.name}", on_crashed=[close_crashed_run], persist_result=False)
def distill(config: Config, rebuild: list[Stage] | None = None, until: Stage = Stage.REGISTER) -> dict:
    """Distil the student of a configuration; what is built already is reused. Returns the summary.

    Args:
        config: What a TOML file holds; what this form accepts is what the file accepts.
        rebuild: Stages to build again, in every round.
        until: The last stage to run.
    """
    with flow_attempt():
        context = Context(config, retry_unreachable(lambda: preflight(config)))
        with track_run(context, frozenset(rebuild or [])) as (run, summary):
            run_pipeline(run, summary, until)
    return summary.written


@contextmanager
def track_run(context: Context, rebuild: frozenset[Stage] = frozenset()) -> Iterator[tuple[Run, Summary]]:
    """A run in MLflow and its summary, both ended as the body ends."""
    work_pools.check_pools(context.config, context.storage)
    key = str(flow_run.id or "")
    run = Run(context, retry_unreachable(lambda: RunWriter(context.config, context.storage, key)), rebuild)
    summary = Summary(run, key)
    try:
        yield run, summary
    except BaseException as error:
        _finish(run, "FAILED")
        with suppress(StoreError):  # the error tells more than that its summary cannot be kept either
            summary.write("failed", str(error))
        if isinstance(error, Exception):  # who interrupts a run does not wait for pictures
            report_run(run, summary.version)
        raise
    report_run(run, summary.version)
    _finish(run, "FINISHED")
    summary.write("completed")


def _finish(run: Run, status: str) -> None:
    """End the run in MLflow. The students are there whether MLflow knows of it or not."""
    if untold := run.tracker.finish(status):
        warn(untold)


@dataclass(frozen=True)
class DistillationResult:
    """What the whole pipeline ended with."""

    questions: Artifact
    student: LocalModel
    evaluated: Artifact
    registered: Artifact
    version: int


def run_pipeline(run: Run, summary: Summary, until: Stage = Stage.REGISTER) -> DistillationResult | None:
    """Every stage up to `until`, in order. None if no student is registered, or if nothing is new to train on."""
    questions = data(run)
    if until == Stage.DATA or not questions.facts["train"]:
        return None
    student = run.resources.student
    for number, (teacher, model) in enumerate(zip(run.config.teachers, run.resources.teachers, strict=True), 1):
        current = Round(number, teacher, model, student)
        masks = mask(run, current)
        if until == Stage.MASK:
            continue
        trained = train_round(run, first_part(run.config, current, questions), questions, masks, until)
        if trained is None:
            return None
        student = run.load_student(trained)
    if until not in (Stage.EVALUATE, Stage.REGISTER):
        return None
    evaluated = evaluate(run, questions, [*run.resources.teachers, initial_student(run.resources), student])
    summary.scores(evaluated, trained)
    if until == Stage.EVALUATE:
        return None
    registered, version = register(run, trained, evaluated)
    summary.registered(registered, version)
    return DistillationResult(questions, student, evaluated, registered, version)


def train_round(run: Run, current: Round, questions: Artifact, masks: Artifact, until: Stage) -> Artifact | None:
    """The training that ends a round, of all mask stages at once or one by one; None if `until` comes before it."""
    with keep_student_engine(run, current):
        while True:
            inputs = prepare_training(run, current, questions, masks, until)
            if inputs is None:
                return None
            trained = train(run, current, inputs)
            if (coming := next_part(run, current, trained)) is None:
                return trained
            current = coming


def prepare_training(run: Run, current: Round, questions: Artifact, masks: Artifact, until: Stage) -> Inputs | None:
    """What a training reads, with responses and verdicts; None if `until`, of the last one, comes before it."""
    inputs = {"data": questions, "masks": masks}
    is_last = current.number == len(run.config.teachers) and current.ends_round
    if Stage.GENERATE in response_stages(run.config):
        evaluated = current.starts_round and until in (Stage.EVALUATE, Stage.REGISTER)
        later = prefetch(run, current, questions) if evaluated else []
        inputs["responses"] = generate(run, current, questions, masks, later)
    if is_last and until == Stage.GENERATE:
        return None
    if Stage.SCORE in response_stages(run.config):
        inputs["verdicts"] = score(run, current, questions, inputs["responses"])
    return None if is_last and until == Stage.SCORE else inputs


def response_stages(config: Config) -> tuple[Stage, ...]:
    """Which of generate and score the objective asks for."""
    if config.train.targets == "labels":
        return ()
    return (Stage.GENERATE, Stage.SCORE) if config.needs_verdicts else (Stage.GENERATE,)
