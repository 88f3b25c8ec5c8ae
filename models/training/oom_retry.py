"""Forward passes that memory holds: within the token budget, and within a smaller one where that was too much."""

import gc
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from masters.common.errors import MastersError
from masters.models.distributed.collectives import lockstep
from masters.models.packing.packed_batch import PackedBatch, pack
from masters.models.packing.prefix_tree import Question
from masters.models.training.context import TrainContext
from masters.models.training.microbatches import batches

T = TypeVar("T")

# what PyTorch says on a CPU, and what CUDA's libraries say that allocate by themselves
AGAIN = "again"  # the event: all ranks are to begin again, with a smaller token budget
NO_MEMORY = re.compile(r"can't allocate memory|bad_alloc|CUDA(?: error:|\]:)? out of memory|_ALLOC_FAILED")

SHOWN = 200  # characters of what the allocator says


class PassTooLarge(MastersError):
    """Memory did not hold a forward pass of these questions."""

    def __init__(self, questions: list[Question]) -> None:
        self.questions, self.tokens = questions, sum(question.tokens for question in questions)
        super().__init__(f"memory does not hold a pass of {self.tokens} tokens")


@dataclass(frozen=True)
class DummyPass:
    """What a rank that has no question left does, to no effect, in a pass that needs all ranks."""

    question: Callable[[], Question]
    work: Callable[[PackedBatch], object]


def each_pass(
    job: TrainContext,
    asked: Iterable[tuple[T, Question]],
    work: Callable[[list[T], PackedBatch], None],
    spare: DummyPass,
) -> None:
    """Give questions to `work` with what they are called, packed within the token budget. Raises PassTooLarge."""
    for batch in lockstep(job.sharding, job.world, batches(asked, lambda one: one[1].tokens, job.token_budget)):
        if batch is None:
            idle = spare.question()
            with one_pass([idle]):
                spare.work(pack([idle], job.student, job.family, job.token_budget))
            continue
        names, questions = map(list, zip(*batch, strict=True))
        with one_pass(questions):
            work(names, pack(questions, job.student, job.family, job.token_budget))


@contextmanager
def one_pass(questions: list[Question]) -> Iterator[None]:
    """Raises PassTooLarge where an allocation fails within."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise PassTooLarge(questions) from error


@contextmanager
def one_step(number: int) -> Iterator[None]:
    """Raises MastersError where an allocation fails outside of a step's passes, which see to their own.

    By then no activation is held, so smaller passes would not help; and the optimizer may have changed a part of the
    weights, so the step cannot be taken again in this process: a checkpoint is what a run goes on from.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:SHOWN]
        raise MastersError(
            f"step {number}: memory does not hold what the optimizer needs beside gradients and weights ({said}). "
            "Smaller passes would not change it: take a larger machine; the run then goes on from its last checkpoint"
        ) from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(NO_MEMORY.search(str(error)))


def within_memory(job: TrainContext, work: Callable[[], T]) -> T:
    """The result of `work`, done again with a smaller token budget whenever memory does not hold one of its passes.

    Gradients are none when it begins again, and a question's weight does not depend on the budget, so it is the same
    step. The budget stays for the rest of the run. Raises MastersError if one question alone does not fit; and where
    passes need all ranks, which wait for this one within theirs: then whoever started them begins again.
    """
    while True:
        try:
            return work()
        except PassTooLarge as error:
            tokens = _smaller(error)
            if job.sharding.lockstep:
                job.report(event=AGAIN, rank=job.rank, tokens=tokens)
                raise MastersError(
                    f"{error}: all processes begin again from the last checkpoint, with passes of {tokens}"
                ) from error
            job.token_budget = tokens
        # out of the handler: the error held on to the pass's tensors
        job.student.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        job.report(event="token_budget", rank=job.rank, tokens=job.token_budget)


def _smaller(error: PassTooLarge) -> int:
    """Half of what failed: less than any two questions of it that came together take."""
    if len(error.questions) > 1:
        return error.tokens // 2
    alone = error.questions[0]
    raise MastersError(
        f"question {alone.question_id}: memory does not hold a pass of it alone ({error.tokens} tokens, "
        f"{len(alone.responses)} responses): lower generate.max_tokens or generate.responses, or take a larger machine"
    ) from error
