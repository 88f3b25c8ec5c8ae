"""generate: the masked teachers and the student answer every training question before training, through vLLM."""

from collections.abc import Callable, Sequence
from functools import partial

from prefect import task

from masters.data import question_shards
from masters.data.question_shards import QuestionRef
from masters.execution.engines import KeptEngine
from masters.models.generation.shards import GeneratingModel, ShardRequest, collect_shards
from masters.store.artifacts import Artifact, Identity
from masters.tasks.build_or_reuse import TASK_OPTIONS, StageResult, build_or_reuse
from masters.tasks.generation_stage import delete_shards, generate_shards, too_long_facts, warn_too_long
from masters.tasks.mask import read_thresholds
from masters.tasks.refresh import mask_stage_refs
from masters.tasks.run_context import Context, Round, Run
from masters.tasks.training_signal import response_shares

VERSION = 1


def shard_requests(context: Context, current: Round, data: Artifact, masks: Artifact) -> list[ShardRequest]:
    """Return the requests for the responses of a round, or of its single mask stage.

    The masked teacher of each mask stage answers that stage's questions (with full coverage all questions), and the
    student answers all questions.
    """
    refs = question_shards.read_refs(data, "train")
    stages = (current.mask_stage.number,) if current.mask_stage else tuple(range(len(current.ratios)))
    return _teacher_requests(context, current, refs, masks, stages) + _student_requests(context, current, refs)


def later_teacher_requests(context: Context, current: Round, data: Artifact, masks: Artifact) -> list[ShardRequest]:
    """Return the requests for the teacher's responses of the mask stages after the round's first one.

    They depend on no training, so one start of the teacher's engine answers them all. For any other part of the round
    there are none.
    """
    if not (current.mask_stage and current.starts_round and current.mask_stage.remaining):
        return []
    refs = question_shards.read_refs(data, "train")
    return _teacher_requests(context, current, refs, masks, current.mask_stage.remaining)


def _teacher_requests(
    context: Context, current: Round, refs: list[QuestionRef], masks: Artifact, stages: tuple[int, ...]
) -> list[ShardRequest]:
    """Return the requests for the masked teacher's responses of these mask stages."""
    config, teacher = context.config.generate, current.teacher
    if not config.teacher_responses:
        return []
    thresholds = read_thresholds(masks)
    model = GeneratingModel(teacher.name, teacher.folder, teacher.digest, thresholds, masks.fingerprint)
    requests: list[ShardRequest] = []
    for stage in stages:
        template = ShardRequest(
            model,
            "responses",
            "teacher",
            config.sampling,
            samples=config.teacher_responses,
            mask_ratio=current.ratios[stage],
            stage=stage,
        )
        stage_refs = mask_stage_refs(context.config, current, refs, stage)
        requests += context.shard_cache.plan_requests(template, stage_refs)
    return requests


def _student_requests(context: Context, current: Round, refs: list[QuestionRef]) -> list[ShardRequest]:
    """Return the requests for the student's responses.

    Shards are planned over all questions even for a single mask stage, so that its questions are answered in the same
    batches as for the whole round, with the student's present weights.
    """
    config, student = context.config.generate, current.generating_student
    if not config.student_responses:
        return []
    model = GeneratingModel(student.name, student.folder, student.digest)
    template = ShardRequest(model, "responses", "student", config.sampling, samples=config.student_responses)
    requests = context.shard_cache.plan_requests(template, refs)
    if current.mask_stage is None:
        return requests
    stage_refs = set(mask_stage_refs(context.config, current, refs, current.mask_stage.number))
    restricted = (request.restrict_to(stage_refs) for request in requests)
    return [request for request in restricted if request]


def make_identity(context: Context, current: Round, requests: list[ShardRequest]) -> Identity:
    generate = context.config.generate
    config = dict(responses=generate.responses, coverage=generate.coverage, sampling=generate.sampling.to_identity())
    if current.mask_stage:
        config |= dict(mask_stage=current.mask_stage.number)
    inputs = {f"shard-{request.fingerprint}": request.fingerprint for request in requests}
    return Identity(f"generate{current.suffix}", VERSION, config, inputs, slug=context.config.name)


@task(name="generate", task_run_name="generate{current.suffix}", **TASK_OPTIONS)
def generate(
    run: Run,
    current: Round,
    data: Artifact,
    masks: Artifact,
    evaluation_requests: Sequence[ShardRequest] = (),
    check_before: Callable[[], None] = lambda: None,
) -> Artifact:
    """Build the table `responses`.

    `evaluation_requests`: what the evaluation asks of the same models, answered by the same start of their engines.
    `check_before`: called before responses are generated; an error that it raises stops the stage.
    """
    requests = shard_requests(run, current, data, masks)
    later_requests = [*later_teacher_requests(run, current, data, masks), *evaluation_requests]
    identity = make_identity(run, current, requests)

    def build() -> StageResult:
        engine = _kept_engine(run, current)
        execution = generate_shards(run, identity, data, requests, later_requests, engine)
        files = collect_shards(run.storage, identity, requests)
        rows = sum(request.rows for request in requests)
        facts = dict(rows=rows) | too_long_facts(run.storage, requests)
        signal = response_shares(run.storage, [request.file for request in requests])
        return StageResult(files, facts | dict(signal=signal), execution)

    upstream = dict(data=data, masks=masks, teacher=current.teacher.origin, student=current.generating_student.origin)
    delete_stored = partial(delete_shards, run.storage, requests)
    generated = build_or_reuse(run, identity, upstream, build, delete_stored, bool(evaluation_requests), check_before)
    warn_too_long(run, identity, generated, "their responses are empty and are not trained on")
    return generated


def _kept_engine(run: Run, current: Round) -> KeptEngine | None:
    """Return the student's engine that is kept between mask stages, None if no engine is kept."""
    stage = current.mask_stage
    if run.resident_engine is None or stage is None:
        return None
    return KeptEngine(run.resident_engine, stage.student.digest, is_reused=bool(stage.remaining))
