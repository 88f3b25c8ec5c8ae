"""Running out of memory in a pass: the same step with smaller passes. Allocation errors are injected or real."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

import pytest
import torch

from masters.common.errors import MastersError
from masters.config import Train
from masters.models.packing.prefix_tree import TokenCounts
from masters.models.training import guards, oom_retry, trainer
from masters.models.training.groups import Step
from masters.models.training.history import HistoryWriter
from masters.models.training.job import TokenBudgetLowered, TrainEvent
from masters.models.training.oom_retry import is_out_of_memory
from masters.models.training.reference_policy import reference_log_probs
from masters.store.storage import Storage
from tests.models.tiny_contexts import gradient, make_context, references

STEP = Step(0, 0, tuple(range(8)))
ERRORS = {
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": lambda: torch.empty(1 << 50),  # the allocator's own error
}


@pytest.fixture
def budgets() -> list[int]:
    """Token budgets that the run reports."""
    return []


@pytest.fixture
def context(budgets: list[int]) -> trainer.TrainContext:
    def report(event: TrainEvent) -> None:
        budgets.extend([event.tokens] if isinstance(event, TokenBudgetLowered) else [])

    return replace(make_context("qwen3_vl"), report=report)


@contextmanager
def limited_memory(
    model: torch.nn.Module, tokens: int, kind: str = "gpu", backward: bool = False, spared: int = 0
) -> Iterator[None]:
    """Let allocations fail in passes of more than `tokens` tokens, forward or backward, after the first `spared`."""
    passes = count(1)

    def fail(*_: object) -> None:
        error = ERRORS[kind]()
        if isinstance(error, Exception):
            raise error

    def forward(_: torch.nn.Module, __: tuple, inputs: dict, out) -> None:
        if next(passes) > spared and inputs["input_ids"].numel() > tokens:
            if not backward:
                fail()
            elif out.last_hidden_state.requires_grad:
                out.last_hidden_state.register_hook(fail)  # after the head's gradient is there already

    hook = model.model.register_forward_hook(forward, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("backward", [False, True])
def test_a_step_with_smaller_passes_is_the_same_step(
    context: trainer.TrainContext, budgets: list[int], kind: str, backward: bool
) -> None:
    known = references(context)
    context.student.zero_grad()
    sums = trainer.run_step(replace(context), STEP, known)
    expected = gradient(context.student)
    context.student.zero_grad()
    with limited_memory(context.student, 100, kind, backward):
        found = trainer.run_step(context, STEP, known)
    small = gradient(context.student)
    context.student.zero_grad()
    assert expected.norm() > 1e-3
    assert (small - expected).norm() / expected.norm() < 2e-5
    assert found == pytest.approx(sums, rel=1e-4, abs=1e-4)
    assert budgets and context.token_budget == budgets[-1] < 150
    failures = len(budgets)
    with limited_memory(context.student, 100, kind, backward):
        trainer.run_step(context, STEP, known)  # the budget stays: nothing fails again
    context.student.zero_grad()
    assert len(budgets) == failures
    repeated = replace(context)
    trainer.run_step(repeated, STEP, known)
    assert torch.equal(gradient(context.student), small)  # bit for bit what that budget gives without a failure
    context.student.zero_grad()


def test_gradients_of_passes_before_the_failure_are_not_kept(context: trainer.TrainContext, budgets: list[int]) -> None:
    known, found = references(context), []
    for spared in (2, 10_000):
        with limited_memory(context.student, 30, spared=spared):
            trainer.run_step(replace(context, token_budget=40), STEP, known)
        found.append(gradient(context.student))
        context.student.zero_grad()
    assert len(budgets) == 1
    assert (found[0] - found[1]).norm() / found[1].norm() < 2e-5


def test_repeated_passes_are_recorded_once(context: trainer.TrainContext) -> None:
    rows = []
    for tokens in (10_000, 100):
        recorded = replace(context, history=HistoryWriter(), token_counts=TokenCounts())
        recorded.history.begin_step(1, 0, 0, 0.2)
        with limited_memory(context.student, tokens):
            trainer.run_step(recorded, STEP, references(context))
        rows.append([(r["question_id"], r["source"], r["sample"]) for r in recorded.history._rows["rewards"]])
    context.student.zero_grad()
    assert rows[0] == rows[1] and len(set(rows[0])) == len(rows[0])


def test_reference_pass_and_probe_continue_with_smaller_passes(context: trainer.TrainContext, tmp_path) -> None:
    context = replace(
        context, storage=Storage(str(tmp_path)), probe=[context.question(group) for group in context.groups]
    )
    whole = reference_log_probs(replace(context, checkpoints="whole"))
    right = guards.count_correct(context)
    with limited_memory(context.student, 100):
        parts = reference_log_probs(replace(context, checkpoints="parts"))
        assert guards.count_correct(context) == right
    assert whole.keys() == parts.keys()
    for g in whole:
        torch.testing.assert_close(parts[g], whole[g], atol=2e-5, rtol=1e-4)


def test_a_question_that_does_not_fit_alone_ends_the_run(context: trainer.TrainContext) -> None:
    known = references(context)
    with (
        limited_memory(context.student, 10),
        pytest.raises(MastersError, match="question q0: memory does not hold") as caught,
    ):
        trainer.run_step(context, STEP, known)
    assert "generate.max_tokens" in str(caught.value)


def test_other_errors_are_raised_as_they_are(context: trainer.TrainContext, budgets: list[int]) -> None:
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and is_out_of_memory(MemoryError())

    def broken(*_: object) -> None:
        raise RuntimeError("shape mismatch")

    hook = context.student.model.register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        trainer.run_step(context, STEP, {})
    hook.remove()
    assert not budgets


@pytest.mark.parametrize("objective", ["kd", "sft"])
def test_kd_and_sft_also_retry_with_smaller_passes(context: trainer.TrainContext, objective: str) -> None:
    targets = "labels" if objective == "sft" else "responses"
    context = replace(context, train=Train.model_validate(dict(objective=objective, targets=targets)))
    found = []
    for tokens in (10_000, 100):
        with limited_memory(context.student, tokens):
            trainer.run_step(context, STEP, {})
        found.append(gradient(context.student))
        context.student.zero_grad()
    assert (found[1] - found[0]).norm() / found[0].norm() < 2e-5


@pytest.mark.parametrize(
    "message",
    ["CUDA out of memory. Tried to allocate 2 GiB", "CUDA error: out of memory", "Triton Error [CUDA]: out of memory"],
)
def test_all_out_of_memory_messages_of_a_gpu_are_recognized(message: str) -> None:
    assert oom_retry.OUT_OF_MEMORY.search(message) and not oom_retry.OUT_OF_MEMORY.search(
        "CUDA error: device-side assert triggered"
    )
