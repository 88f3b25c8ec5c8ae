"""Smaller forward passes after running out of memory."""

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from masters.common.errors import MastersError
from masters.models.packing.prefix_tree import Question
from masters.models.training.context import TrainContext
from masters.models.training.job import RestartRequested, TokenBudgetLowered

T = TypeVar("T")

# PyTorch's message on a CPU, and those of CUDA libraries that allocate by themselves
OUT_OF_MEMORY = re.compile(r"can't allocate memory|bad_alloc|CUDA(?: error:|\]:)? out of memory|_ALLOC_FAILED")
MAX_CHARACTERS = 200  # of the allocator's message in an error


class PassTooLarge(MastersError):
    """Memory does not hold a forward pass of these questions."""

    def __init__(self, questions: list[Question]) -> None:
        self.questions, self.tokens = questions, sum(question.tokens for question in questions)
        super().__init__(f"memory does not hold a pass of {self.tokens} tokens")


@contextmanager
def pass_memory_errors(questions: list[Question]) -> Iterator[None]:
    """Raise PassTooLarge if an allocation fails within."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise PassTooLarge(questions) from error


@contextmanager
def step_memory_errors(number: int) -> Iterator[None]:
    """Raise MastersError if an allocation fails in a step but outside its passes, which handle their own failures.

    By then no activation is held, so smaller passes would not help. The optimizer may have changed some of the
    weights, so this process cannot repeat the step: a new run must resume from a checkpoint.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        message = " ".join(str(error).split())[:MAX_CHARACTERS]
        raise MastersError(
            f"step {number}: memory does not hold what the optimizer needs beside gradients and weights ({message}). "
            "Smaller passes would not change it: take a larger machine; the run then resumes from its last checkpoint"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


def retry_smaller(context: TrainContext, work: Callable[[], T]) -> T:
    """Return the result of `work`; repeat it with a smaller token budget while memory does not hold one of its passes.

    There are no gradients before `work`, and a question's weight does not depend on the budget, so a repetition is the
    same step. The smaller budget stays for the rest of the run. Raises MastersError if one question alone does not fit,
    or if passes need all ranks: the other ranks are waiting in theirs, so all processes must restart.
    """
    while True:
        try:
            return work()
        except PassTooLarge as error:
            tokens = _smaller_budget(error)
            if context.sharding.lockstep:
                context.report(RestartRequested(rank=context.rank, tokens=tokens))
                raise MastersError(
                    f"{error}: all processes restart from the last checkpoint, with passes of {tokens} tokens"
                ) from error
            context.token_budget = tokens
        # outside the except block, because the error refers to the pass's tensors
        context.student.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        context.report(TokenBudgetLowered(rank=context.rank, tokens=context.token_budget))


def _smaller_budget(error: PassTooLarge) -> int:
    """Return half the tokens of the failed pass, so that its questions are split over several passes.

    Raises MastersError if the pass held a single question.
    """
    if len(error.questions) > 1:
        return error.tokens // 2
    question = error.questions[0]
    raise MastersError(
        f"question {question.question_id}: memory does not hold a pass of it alone ({error.tokens} tokens, "
        f"{len(question.responses)} responses): lower generate.max_tokens or generate.responses, or take a larger "
        "machine"
    ) from error
