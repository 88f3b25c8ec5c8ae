"""The mask stages of a round one by one: `generate.refresh = "stage"`, where the student answers as each begins."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from masters.config import Config
from masters.config.mask_schedule import stage_of
from masters.data import question_shards
from masters.data.question_shards import Ref
from masters.execution.processes import Standing
from masters.store.artifacts import Artifact
from masters.tasks.run_context import Context, MaskStage, Round, Run


def begun(config: Config, current: Round, data: Artifact) -> Round:
    """What a round begins with: all its mask stages at once, or the first that has questions alone."""
    return next(iter(parts(config, current, data)), current)


def parts(config: Config, current: Round, data: Artifact) -> list[Round]:
    """The mask stages of a round that are worked on one by one: those that have questions. None if all are at once."""
    if not (stages := separate_stages(config, current)):
        return []
    refs = question_shards.references(data, "train")
    return _parts(current, [stage for stage in stages if of_stage(config, current, refs, stage)])


def following(context: Context, current: Round, trained: Artifact) -> Round | None:
    """What comes in a round after `trained`, the training of `current`; None at the round's end.

    A student that fell on the probe and was put back ends its round, as it does where all mask stages are trained at
    once.
    """
    only = current.only
    if only is None or not only.later or trained.facts.get("rolled_back"):
        return None
    return replace(current, only=MaskStage(only.later[0], context.trained(trained), trained, only.later[1:]))


def separate_stages(config: Config, current: Round) -> range:
    """The mask stages that are worked on one by one, whether or not they have questions; none if there is but one."""
    return range(len(current.ratios) if config.generate.refresh == "stage" and len(current.ratios) > 1 else 0)


def every_part(config: Config, current: Round) -> list[Round]:
    """A round's parts by its settings alone: as if every mask stage had questions and nothing had been trained."""
    return _parts(current, separate_stages(config, current)) or [current]


def of_stage(config: Config, current: Round, refs: list[Ref], stage: int) -> list[Ref]:
    """Which of the training questions belong to a mask stage: all, with full coverage."""
    full, stages = config.generate.coverage == "full", len(current.ratios)
    return [ref for ref in refs if full or stage_of(ref.digest, stages) == stage]


@contextmanager
def student_engine(run: Run, current: Round) -> Iterator[None]:
    """Within it, the student's engine stays between the mask stages of a round and takes each one's weights."""
    if current.only is None:
        yield
        return
    try:
        with Standing() as run.standing:
            yield
    finally:
        run.standing = None


def _parts(current: Round, stages: Sequence[int]) -> list[Round]:
    def only(at: int) -> MaskStage:
        return MaskStage(stages[at], current.student, None, tuple(stages[at + 1 :]))

    return [replace(current, only=only(at)) for at in range(len(stages))]
