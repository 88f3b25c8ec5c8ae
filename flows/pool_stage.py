"""A flow that builds one stage of another run, on the work pool of this deployment. The result goes into the store."""

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
from masters.flows.prefect_compat import worker_name
from masters.flows.retries import flow_attempt, retry_unreachable
from masters.models.generation.shards import ShardCache
from masters.store import artifacts
from masters.store.artifacts import Artifact
from masters.store.storage import Storage, open_storage
from masters.tasks.data import data
from masters.tasks.evaluate import evaluate, initial_student, prefetch
from masters.tasks.generate import generate
from masters.tasks.mask import mask
from masters.tasks.progress import warn
from masters.tasks.refresh import split_round
from masters.tasks.run_context import Context, Round, Run
from masters.tasks.score import score
from masters.tasks.train import train
from masters.tracking.pool_stage import PoolStageWriter

TRAIN_INPUTS = ("data", "masks", "responses", "verdicts")
NO_RETRIES: Any = dict(retries=0)  # the requesting run decides about retries

Artifacts = dict[str, Artifact]  # by role


@flow(name="stage", flow_run_name="{config.name} {assignment.stage}", persist_result=False)
def stage(config: Config, assignment: StageRequest) -> State | None:
    """Build one stage for another run. Runs with `runtime.pools` start this flow; by hand use `masters stage`.

    Args:
        config: The configuration of the requesting run. The allow lists of this worker apply to it.
        assignment: The stage to build, and the artifacts in the store that it reads.
    """
    try:
        with flow_attempt():
            _run_stage(without_pools(config), assignment)
    except MastersError as error:  # the requesting run raises the error again; the state's name tells it which
        return Failed(name=type(error).__name__, message=str(error))
    return None


def _run_stage(config: Config, request: StageRequest) -> None:
    check_config(config)
    storage = retry_unreachable(lambda: open_storage(config.store.root))
    pool_request.check_note(storage, request.key)
    context = retry_unreachable(lambda: _make_context(config, request, storage))
    tracker = retry_unreachable(lambda: PoolStageWriter(config, storage, request))
    run = Run(context, tracker, frozenset(request.rebuild))
    run.started_at = request.began
    _build_stage(run, request)
    if tracker.lost_metrics:
        warn(f"{tracker.lost_metrics} metrics of {request.stage} could not be written to MLflow")
    artifact = run.artifacts[request.stage]
    pool_request.write_result(storage, request.key, artifact, run.stages[-1], worker_name())


def _make_context(config: Config, request: StageRequest, storage: Storage) -> Context:
    """Make a context equal to that of the requesting run."""
    shard_cache = ShardCache(storage, [artifacts.load(storage, folder) for folder in request.earlier])
    known_data = artifacts.load(storage, request.known) if request.known else None
    if student := request.student:
        resources = preflight_from_student(config, artifacts.load(storage, student.folder), student.name)
    else:
        resources = preflight(config)
    return Context(config, resources, shard_cache, known_data)


def _build_stage(run: Run, request: StageRequest) -> None:
    inputs = {role: artifacts.load(run.storage, folder) for role, folder in request.inputs.items()}
    current = find_round(run, request, inputs)
    match request.kind:
        case Stage.DATA:
            data.with_options(**NO_RETRIES)(run)
        case Stage.MASK:
            mask.with_options(**NO_RETRIES)(run, current)
        case Stage.GENERATE:
            prefetched = prefetch(run, current, inputs["data"]) if request.ahead else []
            generate.with_options(**NO_RETRIES)(run, current, inputs["data"], inputs["masks"], prefetched)
        case Stage.SCORE:
            score.with_options(**NO_RETRIES)(run, current, inputs["data"], inputs["responses"])
        case Stage.TRAIN:
            train_inputs = {role: inputs[role] for role in TRAIN_INPUTS if role in inputs}
            train.with_options(**NO_RETRIES)(run, current, train_inputs)
        case Stage.EVALUATE:
            models = [_find_model(run, name, inputs) for name in request.models]
            evaluate.with_options(**NO_RETRIES)(run, inputs["data"], models, request.stage)
        case _:
            raise InputError(f"assignment.stage: {request.stage} cannot run on a pool")


def find_round(run: Run, request: StageRequest, inputs: Artifacts) -> Round:
    """Return the round, or the mask stage of it, that a request is about. Raises InputError if there is none."""
    number, teachers = request.round, run.config.teachers
    if not 1 <= number <= len(teachers):
        raise InputError(
            f"assignment.stage: {request.stage} belongs to round {number}, but there are {len(teachers)} teachers"
        )
    student = run.load_student(inputs["student"]) if number > 1 and "student" in inputs else run.resources.student
    current = Round(number, teachers[number - 1], run.resources.teachers[number - 1], student)
    return current if request.mask_stage is None else _find_mask_stage(run, request, inputs, current)


def _find_mask_stage(run: Run, request: StageRequest, inputs: Artifacts, current: Round) -> Round:
    """Return the requested mask stage. Raises InputError if the round is not split or does not contain it."""
    parts = {f"{request.kind}{part.suffix}": part for part in split_round(run.config, current, inputs["data"])}
    part = parts.get(request.stage)
    if part is None or part.mask_stage is None:
        raise InputError(f"assignment.stage: expected one of {', '.join(parts) or 'none'}, found {request.stage}")
    is_first = request.stage == next(iter(parts))
    if is_first or request.kind == Stage.SCORE:
        return part
    if request.kind == Stage.GENERATE:
        previous = inputs["student"]
        return replace(part, mask_stage=replace(part.mask_stage, previous=previous, student=run.load_student(previous)))
    return replace(part, mask_stage=replace(part.mask_stage, previous=inputs["earlier"]))


def _find_model(run: Run, name: str, inputs: Artifacts) -> LocalModel:
    """Return a model to evaluate by its name in the predictions table."""
    models = {model.name: model for model in [*run.resources.teachers, initial_student(run.resources)]}
    return models[name] if name in models else replace(run.load_student(inputs[f"model {name}"]), name=name)
