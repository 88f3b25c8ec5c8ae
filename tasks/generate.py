"""generate: the masked teachers and the student answer every question ahead of time, through vLLM."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from masters import answering, shards
from masters.answering import Answerer, Order
from masters.artifacts import Artifact, Identity
from masters.config import Generate, Teacher
from masters.models.schedule import stage_of
from masters.preflight import LocalModel, ratios
from masters.tasks.mask import thresholds
from masters.tasks.stage import Run, build_or_reuse, progress_bar

VERSION = 1


def sampling(config: Generate) -> dict:
    """What of [generate] shapes a single response."""
    names = ("temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "dtype", "seed")
    return {name: getattr(config, name) for name in names}


def orders(
    run: Run, data: Artifact, masks: Artifact, teacher: Teacher, models: tuple[LocalModel, LocalModel]
) -> list[Order]:
    """Who answers which shard: each mask stage's teacher its questions (all, with full coverage), the student all."""
    config, stages = run.config.generate, ratios(teacher)
    refs = shards.references(data, "train")
    theirs = Answerer(models[0].name, models[0].folder, models[0].digest, thresholds(masks), masks.fingerprint)
    ours = Answerer(models[1].name, models[1].folder, models[1].digest, {})
    asked = []
    for stage, ratio in enumerate(stages):
        own = [ref for ref in refs if config.coverage == "full" or stage_of(ref.digest, len(stages)) == stage]
        asked += [
            Order(theirs, shard, "responses", "teacher", ratio, stage, config.teacher_responses, sampling(config))
            for shard in shards.plan(own)
            if config.teacher_responses
        ]
    asked += [
        Order(ours, shard, "responses", "student", None, 0, config.student_responses, sampling(config))
        for shard in shards.plan(refs)
        if config.student_responses
    ]
    return asked


def identity(run: Run, asked: list[Order], stage: str) -> Identity:
    config = run.config.generate
    made_of = dict(responses=config.responses, coverage=config.coverage, sampling=sampling(config))
    inputs = {f"shard-{order.fingerprint}": order.fingerprint for order in asked}
    return Identity(stage, VERSION, made_of, inputs, slug=run.config.name)


@task(name="generate", task_run_name="{stage}", cache_policy=NO_CACHE)
def generate(
    run: Run,
    data: Artifact,
    masks: Artifact,
    teacher: Teacher,
    models: tuple[LocalModel, LocalModel],
    stage: str = "generate",
) -> Artifact:
    """Table `responses`; `models` are the teacher and the student of this round."""
    asked = orders(run, data, masks, teacher, models)
    made_of = identity(run, asked, stage)

    def build() -> tuple[dict[str, str], dict, dict]:
        if run.rebuilds(made_of):
            for order in asked:
                run.storage.remove(order.file)
        with progress_bar(stage) as bar:
            shown = bar.add_task("questions", total=None)
            how = answering.fulfil(
                data, asked, run.config.runtime, run.work(made_of),
                lambda done, total: bar.update(shown, completed=done, total=total),
            )  # fmt: skip
        files = answering.gather(run.storage, made_of, "responses", asked)
        rows = sum(order.samples * len(order.shard.refs) for order in asked)
        return files, dict(rows=rows), how

    return build_or_reuse(run, made_of, build)
