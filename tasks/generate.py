"""generate: the masked teachers and the student answer every question ahead of time, through vLLM."""

from collections.abc import Sequence

from prefect import task

from masters import judging, shards
from masters.answering import NO_SHARD, Answerer, Order
from masters.artifacts import Artifact, Identity
from masters.config import Generate
from masters.models.schedule import stage_of
from masters.processes import Child
from masters.stages import Stage
from masters.tasks.answers import answered, forget, set_aside, tell_set_aside
from masters.tasks.mask import thresholds
from masters.tasks.score import judge_of
from masters.tasks.stage import STAGE, Context, Round, Run, build_or_reuse

VERSION = 1


def sampling(config: Generate) -> dict:
    """What of [generate] shapes a single response."""
    names = ("temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "dtype", "seed")
    return {name: getattr(config, name) for name in names}


def orders(context: Context, current: Round, data: Artifact, masks: Artifact) -> list[Order]:
    """Who answers which shard: each mask stage's teacher its questions (all, with full coverage), the student all."""
    config, stages, teacher, student = context.config.generate, current.ratios, current.teacher, current.student
    refs = shards.references(data, "train")
    theirs = Answerer(teacher.name, teacher.folder, teacher.digest, thresholds(masks), masks.fingerprint)
    ours = Answerer(student.name, student.folder, student.digest, {})
    asked = []
    for stage, ratio in enumerate(stages):
        own = [ref for ref in refs if config.coverage == "full" or stage_of(ref.digest, len(stages)) == stage]
        if config.teacher_responses:
            count = config.teacher_responses
            order = Order(theirs, NO_SHARD, "responses", "teacher", ratio, stage, count, sampling(config))
            asked += context.earlier.orders(order, own)
    if config.student_responses:
        order = Order(ours, NO_SHARD, "responses", "student", None, 0, config.student_responses, sampling(config))
        asked += context.earlier.orders(order, refs)
    return asked


def identity(context: Context, current: Round, asked: list[Order]) -> Identity:
    config = context.config.generate
    made_of = dict(responses=config.responses, coverage=config.coverage, sampling=sampling(config))
    inputs = {f"shard-{order.fingerprint}": order.fingerprint for order in asked}
    return Identity(f"generate{current.suffix}", VERSION, made_of, inputs, slug=context.config.name)


@task(name="generate", task_run_name="generate{current.suffix}", **STAGE)
def generate(run: Run, current: Round, data: Artifact, masks: Artifact, ahead: Sequence[Order] = ()) -> Artifact:
    """Table `responses`. `ahead`: what a later stage asks of the same models, for one start of their engines."""
    asked = orders(run, current, data, masks)
    made_of = identity(run, current, asked)

    def build() -> tuple[dict[str, str], dict, dict]:
        files, how = answered(run, made_of, data, asked, ahead, _judge_beside(run, current, made_of, data, asked))
        rows = sum(order.samples * len(order.shard.refs) for order in asked)
        return files, dict(rows=rows) | set_aside(run.storage, asked), how

    upstream = dict(data=data, masks=masks, teacher=current.teacher.origin, student=current.student.origin)
    made = build_or_reuse(run, made_of, upstream, build, lambda: forget(run.storage, asked))
    return tell_set_aside(run, made_of, made, "their responses are empty and are not learnt from")


def _judge_beside(run: Run, current: Round, made_of: Identity, data: Artifact, asked: list[Order]) -> Child | None:
    """A judge that is a server gives its verdicts while the engines answer; `score` finds them."""
    judge = judge_of(run, current)
    if judge is None or Stage.SCORE in run.rebuild:  # which forgets what was judged
        return None
    return judging.ahead(data, judge, [order.file for order in asked], run.config.runtime, run.work(made_of))
