"""generate: the masked teachers and the student answer every question ahead of time, through vLLM."""

from collections.abc import Sequence
from functools import partial

from prefect import task

from masters.config import Generate
from masters.config.stages import Stage
from masters.data import question_shards
from masters.data.question_shards import Ref
from masters.execution.engines import Stay
from masters.execution.processes import Child
from masters.models.generation.shards import NO_SHARD, GeneratingModel, ShardRequest, collect_shards, narrowed
from masters.models.judging import batches
from masters.store.artifacts import Artifact, Identity
from masters.tasks.build import STAGE, build_or_reuse
from masters.tasks.generation_stage import answer, forget, set_aside, tell_set_aside
from masters.tasks.judges import judge_of
from masters.tasks.mask import thresholds
from masters.tasks.refresh import of_stage
from masters.tasks.run_context import Context, Round, Run

VERSION = 1


def sampling(config: Generate) -> dict:
    """What of [generate] shapes a single response."""
    names = ("temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "dtype", "seed")
    return {name: getattr(config, name) for name in names}


def orders(context: Context, current: Round, data: Artifact, masks: Artifact) -> list[ShardRequest]:
    """Who answers which shard: each mask stage's teacher its questions (all, with full coverage), the student all.

    Of a mask stage that is worked on alone, its teacher and its questions.
    """
    refs = question_shards.references(data, "train")
    stages = (current.only.number,) if current.only else tuple(range(len(current.ratios)))
    return _of_teacher(context, current, refs, masks, stages) + _of_student(context, current, refs)


def teachers_ahead(context: Context, current: Round, data: Artifact, masks: Artifact) -> list[ShardRequest]:
    """What the teacher is asked at the mask stages that follow a round's first one: known as that one begins, so that
    one start of its engine does for all."""
    if not (current.only and current.begins and current.only.later):
        return []
    return _of_teacher(context, current, question_shards.references(data, "train"), masks, current.only.later)


def _of_teacher(
    context: Context, current: Round, refs: list[Ref], masks: Artifact, stages: tuple[int, ...]
) -> list[ShardRequest]:
    config, teacher = context.config.generate, current.teacher
    if not (count := config.teacher_responses):
        return []
    theirs, asked = (
        GeneratingModel(teacher.name, teacher.folder, teacher.digest, thresholds(masks), masks.fingerprint),
        [],
    )
    for stage in stages:
        ratio = current.ratios[stage]
        order = ShardRequest(theirs, NO_SHARD, "responses", "teacher", ratio, stage, count, sampling(config))
        asked += context.earlier.orders(order, of_stage(context.config, current, refs, stage))
    return asked


def _of_student(context: Context, current: Round, refs: list[Ref]) -> list[ShardRequest]:
    """The student's shards are planned over all questions even where it answers those of a mask stage alone: so it
    answers them as it would have answered them before the round with the weights that it has now."""
    config, student = context.config.generate, current.answering
    if not (count := config.student_responses):
        return []
    ours = GeneratingModel(student.name, student.folder, student.digest, {})
    order = ShardRequest(ours, NO_SHARD, "responses", "student", None, 0, count, sampling(config))
    planned = context.earlier.orders(order, refs)
    if current.only is None:
        return planned
    wanted = set(of_stage(context.config, current, refs, current.only.number))
    return [own for whole in planned if (own := narrowed(whole, wanted))]


def identity(context: Context, current: Round, asked: list[ShardRequest]) -> Identity:
    config = context.config.generate
    made_of = dict(responses=config.responses, coverage=config.coverage, sampling=sampling(config))
    if current.only:
        made_of |= dict(mask_stage=current.only.number)
    inputs = {f"shard-{order.fingerprint}": order.fingerprint for order in asked}
    return Identity(f"generate{current.suffix}", VERSION, made_of, inputs, slug=context.config.name)


@task(name="generate", task_run_name="generate{current.suffix}", **STAGE)
def generate(run: Run, current: Round, data: Artifact, masks: Artifact, ahead: Sequence[ShardRequest] = ()) -> Artifact:
    """Table `responses`. `ahead`: what a later stage asks of the same models, for one start of their engines."""
    with_evaluation = bool(ahead)
    asked, ahead = orders(run, current, data, masks), [*teachers_ahead(run, current, data, masks), *ahead]
    made_of = identity(run, current, asked)

    def build() -> tuple[dict[str, str], dict, dict]:
        judge = _judge_beside(run, current, made_of, data, asked)
        how = answer(run, made_of, data, asked, ahead, judge, stay=_stay(run, current))
        files = collect_shards(run.storage, made_of, asked)
        rows = sum(order.samples * len(order.shard.refs) for order in asked)
        return files, dict(rows=rows) | set_aside(run.storage, asked), how

    upstream = dict(data=data, masks=masks, teacher=current.teacher.origin, student=current.answering.origin)
    forgotten = partial(forget, run.storage, asked)
    made = build_or_reuse(run, made_of, upstream, build, forgotten, ahead=with_evaluation)
    return tell_set_aside(run, made_of, made, "their responses are empty and are not learnt from")


def _stay(run: Run, current: Round) -> Stay | None:
    """The student's engine, where it stays for the mask stages that follow."""
    if run.standing is None or current.only is None:
        return None
    return Stay(run.standing, current.only.student.digest, again=bool(current.only.later))


def _judge_beside(
    run: Run, current: Round, made_of: Identity, data: Artifact, asked: list[ShardRequest]
) -> Child | None:
    """A judge that is a server gives its verdicts while the engines answer; `score` finds them."""
    judge = judge_of(run, current) if run.config.needs_verdicts else None
    if judge is None or Stage.SCORE in run.rebuild:  # which forgets what was judged
        return None
    return batches.start_early_judging(
        data, judge, [order.file for order in asked], run.config.runtime, run.work(made_of)
    )
