"""Forward passes of packed questions within the token budget, on every rank."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from masters.models.distributed.collectives import lockstep
from masters.models.packing.packed_batch import PackedBatch, pack
from masters.models.packing.prefix_tree import Question
from masters.models.training.context import TrainContext
from masters.models.training.load_balancing import batches
from masters.models.training.oom_retry import pass_memory_errors

T = TypeVar("T")


@dataclass(frozen=True)
class DummyPass:
    """Forward and backward pass without effect that keeps an idle rank in the collective operations of the others."""

    question: Callable[[], Question]
    run: Callable[[PackedBatch], object]


def run_passes(
    context: TrainContext,
    questions: Iterable[tuple[T, Question]],
    run: Callable[[list[T], PackedBatch], None],
    dummy: DummyPass,
) -> None:
    """Call `run` on batches of packed questions within the token budget, with the label of each question.

    Raises PassTooLarge if memory does not hold a batch.
    """
    labeled_batches = batches(questions, lambda labeled: labeled[1].tokens, context.token_budget)
    for batch in lockstep(context.sharding, context.world, labeled_batches):
        labels = [label for label, _ in batch or []]
        packable = [question for _, question in batch] if batch else [dummy.question()]
        with pass_memory_errors(packable):
            packed = pack(packable, context.student, context.family, context.token_budget)
            if batch:
                run(labels, packed)
            else:
                dummy.run(packed)
