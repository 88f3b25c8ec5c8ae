"""Split a round into its mask stages (`generate.refresh = "stage"`): the student generates again in each of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from masters.config import Config
from masters.config.mask_schedule import mask_stage_of
from masters.data import question_shards
from masters.data.question_shards import QuestionRef
from masters.execution.processes import PersistentProcess
from masters.store.artifacts import Artifact
from masters.tasks.run_context import Context, MaskStage, Round, Run


def first_part(config: Config, current: Round, data: Artifact) -> Round:
    """Return the part that a round begins with: its first mask stage with questions, or the whole round."""
    return next(iter(split_round(config, current, data)), current)


def split_round(config: Config, current: Round, data: Artifact) -> list[Round]:
    """Split a round into its mask stages that have questions. Empty if all mask stages are built at once."""
    if not (stages := separate_mask_stages(config, current)):
        return []
    refs = question_shards.read_refs(data, "train")
    return _restrict(current, [stage for stage in stages if mask_stage_refs(config, current, refs, stage)])


def next_part(context: Context, current: Round, trained: Artifact) -> Round | None:
    """Return the part of the round after `current`, whose train artifact is `trained`; None at the round's end.

    A rollback (`train.on_drop`) ends the round, as it does when all mask stages are trained at once.
    """
    stage = current.mask_stage
    if stage is None or not stage.remaining or trained.facts.get("rolled_back"):
        return None
    number, *remaining = stage.remaining
    return replace(current, mask_stage=MaskStage(number, context.load_student(trained), trained, tuple(remaining)))


def separate_mask_stages(config: Config, current: Round) -> range:
    """Return the numbers of the mask stages that are built one by one; empty if all are built at once."""
    is_separate = config.generate.refresh == "stage" and len(current.ratios) > 1
    return range(len(current.ratios) if is_separate else 0)


def planned_parts(config: Config, current: Round) -> list[Round]:
    """Return the parts of a round by its settings alone, as if every mask stage had questions."""
    return _restrict(current, separate_mask_stages(config, current)) or [current]


def mask_stage_refs(config: Config, current: Round, refs: list[QuestionRef], stage: int) -> list[QuestionRef]:
    """Select the training questions of a mask stage: all of them with full coverage."""
    is_full, stages = config.generate.coverage == "full", len(current.ratios)
    return [ref for ref in refs if is_full or mask_stage_of(ref.digest, stages) == stage]


@contextmanager
def keep_student_engine(run: Run, current: Round) -> Iterator[None]:
    """Keep the student's engine running between the mask stages of a round; each stage gives it new weights."""
    if current.mask_stage is None:
        yield
        return
    try:
        with PersistentProcess() as run.resident_engine:
            yield
    finally:
        run.resident_engine = None


def _restrict(current: Round, stages: Sequence[int]) -> list[Round]:
    """Restrict the round to each of the mask stages, as if none of them had been trained."""
    return [
        replace(current, mask_stage=MaskStage(number, current.student, None, tuple(stages[at + 1 :])))
        for at, number in enumerate(stages)
    ]
