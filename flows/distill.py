"""The whole pipeline: data, mask, generate, score, train, evaluate, register. Each teacher has its own round."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from prefect import Flow, State, flow
from prefect.client.schemas.objects import FlowRun
from prefect.runtime import flow_run

from masters.checks.model_folder import LocalModel
from masters.checks.preflight import preflight
from masters.common.errors import StoreError
from masters.config import Config
from masters.config.allowlist import check_config
from masters.config.stages import Stage, stages_up_to
from masters.flows.retries import flow_attempt, retry_unreachable
from masters.flows.summary import Summary
from masters.store.artifacts import Artifact
from masters.store.storage import Storage
from masters.tasks import work_pools
from masters.tasks.data import data
from masters.tasks.evaluate import evaluate, initial_student, prefetch
from masters.tasks.generate import generate
from masters.tasks.judges import ask_judge_first, is_judged_by_server
from masters.tasks.mask import mask
from masters.tasks.progress import warn
from masters.tasks.refresh import first_part, keep_student_engine, next_part
from masters.tasks.register import register
from masters.tasks.report import report_run
from masters.tasks.run_context import Context, Round, Run
from masters.tasks.score import score
from masters.tasks.train import Inputs, train
from masters.tracking.locations import tracking_uri
from masters.tracking.open_runs import end_lost_runs, end_runs_with_key
from masters.tracking.run_writer import RunWriter


def close_crashed_run(flow: Flow, flow_run: FlowRun, state: State) -> None:
    """End the MLflow runs that a crashed flow run left RUNNING. Called in the Prefect worker."""
    config = Config.model_validate(flow_run.parameters["config"])
    check_config(config)  # this process must not reach a store or MLflow that is not allowed either
    storage = Storage(config.store.root)
    uri = tracking_uri(config, storage)
    end_runs_with_key(uri, storage, str(flow_run.id))
    end_lost_runs(uri, storage)


@flow(name="distill", flow_run_name="{config.name}", on_crashed=[close_crashed_run], persist_result=False)
def distill(config: Config, rebuild: list[Stage] | None = None, until: Stage = Stage.REGISTER) -> dict:
    """Distill the student of a configuration and return the run's summary. Stages that are already built are reused.

    Args:
        config: The configuration, with the same keys and values as in a TOML file.
        rebuild: Stages to build again, in every round.
        until: The last stage to run.
    """
    with flow_attempt():
        context = Context(config, retry_unreachable(lambda: preflight(config)))
        with track_run(context, frozenset(rebuild or [])) as (run, summary):
            run_pipeline(run, summary, until)
    return summary.content


@contextmanager
def track_run(context: Context, rebuild: frozenset[Stage] = frozenset()) -> Iterator[tuple[Run, Summary]]:
    """Open a run in MLflow and a summary for the body, and complete both when the body ends."""
    work_pools.check_pools(context.config, context.storage)
    tracker = open_tracker(context.config, context.storage, "distill")
    run = Run(context, tracker, rebuild)
    summary = Summary(run, str(flow_run.id or ""))
    try:
        yield run, summary
    except BaseException as error:
        finish_tracking(tracker, "FAILED")
        with suppress(StoreError):  # the first error matters more than a summary that cannot be written
            summary.write("failed", str(error))
        if isinstance(error, Exception):  # after an interrupt, nobody waits for plots
            report_run(run, summary.version)
        raise
    report_run(run, summary.version)
    finish_tracking(tracker, "FINISHED")
    summary.write("completed")


def open_tracker(config: Config, storage: Storage, flow: str) -> RunWriter:
    """Open the MLflow run of this flow run, and warn of what was deleted in MLflow."""
    tracker = retry_unreachable(lambda: RunWriter(config, storage, str(flow_run.id or ""), flow))
    for note in tracker.notes:
        warn(note)
    return tracker


@contextmanager
def finish_with_status(tracker: RunWriter) -> Iterator[None]:
    """End the tracker's MLflow run when the body ends, as FINISHED, or as FAILED if the body raises."""
    try:
        yield
    except BaseException:
        finish_tracking(tracker, "FAILED")
        raise
    finish_tracking(tracker, "FINISHED")


def finish_tracking(tracker: RunWriter, status: str) -> None:
    """End the tracker's MLflow run. If MLflow fails, only warn: the artifacts are complete without it."""
    if warning := tracker.finish(status):
        warn(warning)


@dataclass(frozen=True)
class DistillationResult:
    """Artifacts of the complete pipeline. `version`: of the registered model."""

    questions: Artifact
    student: LocalModel
    evaluated: Artifact
    registered: Artifact
    version: int


def run_pipeline(run: Run, summary: Summary, until: Stage = Stage.REGISTER) -> DistillationResult | None:
    """Run the stages up to `until`. Returns None if it ends before register or there are no training questions."""
    stages = stages_up_to(until)
    questions = data(run)
    if Stage.MASK not in stages or not questions.facts["train"]:
        return None
    student = run.resources.student
    for number, (config, teacher) in enumerate(zip(run.config.teachers, run.resources.teachers, strict=True), 1):
        current = Round(number, config, teacher, student)
        masks = mask(run, current)
        if Stage.GENERATE not in stages:
            continue  # the masks of all teachers need no student
        trained = train_round(run, first_part(run.config, current, questions), questions, masks, stages)
        if trained is None:
            return None
        student = run.load_student(trained)
    if Stage.EVALUATE not in stages:
        return None
    evaluated = evaluate(run, questions, [*run.resources.teachers, initial_student(run.resources), student])
    summary.set_scores(evaluated, trained)
    if Stage.REGISTER not in stages:
        return None
    registered, version = register(run, trained, evaluated)
    summary.set_registered_model(registered, version)
    return DistillationResult(questions, student, evaluated, registered, version)


def train_round(
    run: Run, current: Round, questions: Artifact, masks: Artifact, stages: Collection[Stage]
) -> Artifact | None:
    """Train all parts of a round, beginning with `current`.

    Returns the round's last train artifact, or None if the run ends before it (train is not among `stages`).
    """
    with keep_student_engine(run, current):
        while True:
            inputs = build_train_inputs(run, current, questions, masks, stages)
            if inputs is None:
                return None
            trained = train(run, current, inputs)
            if (following := next_part(run, current, trained)) is None:
                return trained
            current = following


def build_train_inputs(
    run: Run, current: Round, questions: Artifact, masks: Artifact, stages: Collection[Stage]
) -> Inputs | None:
    """Build the responses and verdicts that a training reads. Returns None if the run ends before the training.

    Only the last training of a run can be left out; later stages need all trainings before it.
    """
    is_last = current.number == len(run.config.teachers) and current.ends_round
    needed = stages if is_last else stages_up_to(Stage.TRAIN)
    inputs = {"data": questions, "masks": masks}
    if Stage.GENERATE in response_stages(run.config):
        prefetched = prefetch(run, current, questions) if current.starts_round and Stage.EVALUATE in stages else []
        ask_judge = partial(ask_judge_if_needed, run, {*needed, *stages})
        inputs["responses"] = generate(run, current, questions, masks, prefetched, ask_judge)
    if Stage.SCORE in response_stages(run.config) and Stage.SCORE in needed:
        inputs["verdicts"] = score(run, current, questions, inputs["responses"])
    return inputs if Stage.TRAIN in needed else None


def ask_judge_if_needed(run: Run, stages: Collection[Stage]) -> None:
    """Ask the judge's server for a verdict, if this run needs it, before responses are generated in vain."""
    if is_judged_by_server(run, stages):
        ask_judge_first(run)


def response_stages(config: Config) -> tuple[Stage, ...]:
    """Return which of the stages generate and score the training objective needs."""
    if config.train.targets == "labels":
        return ()
    return (Stage.GENERATE, Stage.SCORE) if config.needs_verdicts else (Stage.GENERATE,)
