"""One stage of somebody's run, on the work pool of this deployment: built from references, answered in the store."""

from dataclasses import replace
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Failed

from masters.checks.model_folder import LocalModel
from masters.checks.preflight import preflight, preflight_from_student
from masters.common.errors import InputError, MastersError
from masters.config import Config
from masters.config.allowlist import check_config
from masters.config.stages import Stage
from masters.execution import pool_request
from masters.execution.pool_request import StageRequest, without_pools
from masters.flows.retries import flow_attempt, retry_unreachable
from masters.models.generation.shards import ShardCache
from masters.store import artifacts
from masters.store.artifacts import Artifact
from masters.store.storage import Storage, open_storage
from masters.tasks.data import data
from masters.tasks.evaluate import initial_student, evaluate, prefetch
from masters.tasks.generate import generate
from masters.tasks.mask import mask
from masters.tasks.progress import warn
from masters.tasks.refresh import split_round
from masters.tasks.run_context import Context, Round, Run
from masters.tasks.score import score
from masters.tasks.train import train
from masters.tracking.pool_stage import PoolStageWriter

TABLES = ("data", "masks", "responses", "verdicts")  # what train reads
ONCE: Any = dict(retries=0)  # whether it is tried again, the run that asked decides

Given = dict[str, Artifact]


@flow(name="stage", flow_run_name="{config.name} {assignment.stage}", persist_result=False)
def stage(config: Config, assignment: StageRequest) -> State | None:
    """Build one stage. Runs with `runtime.pools` start this; by hand use `masters stage`.

    Args:
        config: Of the run that asks. What this worker allows holds for it, whatever the other machine allows.
        assignment: Which stage, and where in the store lies what it is made from.
    """
    try:
        with flow_attempt():
            _work(without_pools(config), assignment)
    except MastersError as error:  # its kind is the state's name: the run that asked raises it again
        return Failed(name=type(error).__name__, message=str(error))
    return None


def _work(config: Config, wanted: StageRequest) -> None:
    check_config(config)
    storage = retry_unreachable(lambda: open_storage(config.store.root))
    pool_request.check_note(storage, wanted.key)
    context = retry_unreachable(lambda: _context(config, wanted, storage))
    tracker = retry_unreachable(lambda: PoolStageWriter(config, storage, wanted))
    run = Run(context, tracker, frozenset(wanted.rebuild))
    run.started_at = wanted.began
    _build(run, wanted)
    if tracker.lost:
        warn(f"{tracker.lost} metrics of {wanted.stage} could not be written to MLflow")
    pool_request.write_result(storage, wanted.key, run.artifacts[wanted.stage], run.stages[-1])


def _context(config: Config, wanted: StageRequest, storage: Storage) -> Context:
    """What the run that asked knows, found again."""
    earlier = ShardCache(storage, [artifacts.load(storage, folder) for folder in wanted.earlier])
    known = artifacts.load(storage, wanted.known) if wanted.known else None
    if student := wanted.student:
        resources = preflight_from_student(config, artifacts.load(storage, student.folder), student.name)
    else:
        resources = preflight(config)
    return Context(config, resources, earlier, known)


def _build(run: Run, wanted: StageRequest) -> None:
    given = {role: artifacts.load(run.storage, folder) for role, folder in wanted.inputs.items()}
    current = _round(run, wanted, given)
    match wanted.kind:
        case Stage.DATA:
            data.with_options(**ONCE)(run)
        case Stage.MASK:
            mask.with_options(**ONCE)(run, current)
        case Stage.GENERATE:
            later = prefetch(run, current, given["data"]) if wanted.ahead else []
            generate.with_options(**ONCE)(run, current, given["data"], given["masks"], later)
        case Stage.SCORE:
            score.with_options(**ONCE)(run, current, given["data"], given["responses"])
        case Stage.TRAIN:
            train.with_options(**ONCE)(run, current, {role: given[role] for role in TABLES if role in given})
        case Stage.EVALUATE:
            asked = [_model(run, name, given) for name in wanted.models]
            evaluate.with_options(**ONCE)(run, given["data"], asked, wanted.stage)
        case _:
            raise InputError(f"assignment.stage: {wanted.stage} runs on no pool of its own")


def _round(run: Run, wanted: StageRequest, given: Given) -> Round:
    number, teachers = wanted.round, run.config.teachers
    if not 1 <= number <= len(teachers):
        raise InputError(f"assignment.stage: {wanted.stage} asks for round {number}, and there are {len(teachers)}")
    student = run.load_student(given["student"]) if number > 1 and "student" in given else run.resources.student
    current = Round(number, teachers[number - 1], run.resources.teachers[number - 1], student)
    return current if wanted.mask_stage is None else _part(run, wanted, given, current)


def _part(run: Run, wanted: StageRequest, given: Given, current: Round) -> Round:
    """The mask stage of a round that is asked for. Raises InputError if the round is not worked on in such parts."""
    by_name = {f"{wanted.kind}{part.suffix}": part for part in split_round(run.config, current, given["data"])}
    part = by_name.get(wanted.stage)
    if part is None or part.mask_stage is None:
        raise InputError(f"assignment.stage: expected one of {', '.join(by_name) or 'none'}, found {wanted.stage}")
    if wanted.stage == next(iter(by_name)) or wanted.kind == Stage.SCORE:
        return part
    if wanted.kind == Stage.GENERATE:
        earlier = given["student"]
        return replace(part, mask_stage=replace(part.mask_stage, previous=earlier, student=run.load_student(earlier)))
    return replace(part, mask_stage=replace(part.mask_stage, previous=given["earlier"]))


def _model(run: Run, name: str, given: Given) -> LocalModel:
    """A model to evaluate, by its name in the predictions table."""
    known = {model.name: model for model in [*run.resources.teachers, initial_student(run.resources)]}
    return known[name] if name in known else replace(run.load_student(given[f"model {name}"]), name=name)
