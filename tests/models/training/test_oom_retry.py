"""Where memory does not hold a pass: smaller ones, the same step. Allocators fail by injection and for real."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

import pytest
import torch

from masters.common.errors import MastersError
from masters.config import Train
from masters.models.packing.prefix_tree import Sizes
from masters.models.training import guards, oom_retry, trainer
from masters.models.training.groups import Step
from masters.models.training.history import HistoryWriter
from masters.models.training.oom_retry import out_of_memory
from masters.models.training.reference_policy import reference_log_probs
from masters.store.storage import Storage
from tests.models.tiny_jobs import gradient, make_job, references

STEP = Step(0, 0, tuple(range(8)))
ERRORS = {
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": lambda: torch.empty(1 << 50),  # the allocator's own error
}


@pytest.fixture
def budgets() -> list[int]:
    """Token budgets that the job reports."""
    return []


@pytest.fixture
def job(budgets: list[int]) -> trainer.TrainContext:
    def report(event: str, tokens: int = 0, **_: object) -> None:
        budgets.extend([tokens] if event == "token_budget" else [])

    return replace(make_job("qwen3_vl"), report=report)


@contextmanager
def memory_of(
    model: torch.nn.Module, tokens: int, kind: str = "gpu", backward: bool = False, spared: int = 0
) -> Iterator[None]:
    """An allocator that fails in passes of more tokens than these, forward or backward; not in the first `spared`."""
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
def test_a_step_that_memory_does_not_hold_is_the_same_step(
    job: trainer.TrainContext, budgets: list[int], kind: str, backward: bool
) -> None:
    known = references(job)
    job.student.zero_grad()
    sums = trainer.run_step(replace(job), STEP, known)
    expected = gradient(job.student)
    job.student.zero_grad()
    with memory_of(job.student, 100, kind, backward):
        found = trainer.run_step(job, STEP, known)
    small = gradient(job.student)
    job.student.zero_grad()
    assert expected.norm() > 1e-3
    assert (small - expected).norm() / expected.norm() < 2e-5
    assert found == pytest.approx(sums, rel=1e-4, abs=1e-4)
    assert budgets and job.token_budget == budgets[-1] < 150
    failures = len(budgets)
    with memory_of(job.student, 100, kind, backward):
        trainer.run_step(job, STEP, known)  # the budget stays: nothing fails again
    job.student.zero_grad()
    assert len(budgets) == failures
    again = replace(job)
    trainer.run_step(again, STEP, known)
    assert torch.equal(gradient(job.student), small)  # bit for bit what that budget gives without a failure
    job.student.zero_grad()


def test_gradients_of_passes_before_the_failure_are_not_kept(job: trainer.TrainContext, budgets: list[int]) -> None:
    known, found = references(job), []
    for spared in (2, 10_000):
        with memory_of(job.student, 30, spared=spared):
            trainer.run_step(replace(job, token_budget=40), STEP, known)
        found.append(gradient(job.student))
        job.student.zero_grad()
    assert len(budgets) == 1
    assert (found[0] - found[1]).norm() / found[1].norm() < 2e-5


def test_what_was_taken_twice_is_recorded_once(job: trainer.TrainContext) -> None:
    rows = []
    for tokens in (10_000, 100):
        recorded = replace(job, ledger=HistoryWriter(), tally=Sizes())
        recorded.ledger.begin(1, 0, 0, 0.2)
        with memory_of(job.student, tokens):
            trainer.run_step(recorded, STEP, references(job))
        rows.append([(r["question_id"], r["source"], r["sample"]) for r in recorded.ledger._rows["rewards"]])
    job.student.zero_grad()
    assert rows[0] == rows[1] and len(set(rows[0])) == len(rows[0])


def test_reference_pass_and_probe_go_on_with_smaller_passes(job: trainer.TrainContext, tmp_path) -> None:
    job = replace(job, storage=Storage(str(tmp_path)), probe=[job.question(group) for group in job.groups])
    whole = reference_log_probs(replace(job, checkpoints="whole"))
    right = guards.count_correct(job)
    with memory_of(job.student, 100):
        parts = reference_log_probs(replace(job, checkpoints="parts"))
        assert guards.count_correct(job) == right
    assert whole.keys() == parts.keys()
    for g in whole:
        torch.testing.assert_close(parts[g], whole[g], atol=2e-5, rtol=1e-4)


def test_a_question_that_does_not_fit_alone_ends_the_run(job: trainer.TrainContext) -> None:
    known = references(job)
    with memory_of(job.student, 10), pytest.raises(MastersError, match="question q0: memory does not hold") as caught:
        trainer.run_step(job, STEP, known)
    assert "generate.max_tokens" in str(caught.value)


def test_other_errors_are_not_taken_for_it(job: trainer.TrainContext, budgets: list[int]) -> None:
    assert not out_of_memory(RuntimeError("shape mismatch")) and out_of_memory(MemoryError())

    def broken(*_: object) -> None:
        raise RuntimeError("shape mismatch")

    hook = job.student.model.register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        trainer.run_step(job, STEP, {})
    hook.remove()
    assert not budgets


@pytest.mark.parametrize("objective", ["kd", "sft"])
def test_kd_and_sft_also_retry_with_smaller_passes(job: trainer.TrainContext, objective: str) -> None:
    targets = "labels" if objective == "sft" else "responses"
    job = replace(job, train=Train.model_validate(dict(objective=objective, targets=targets)))
    found = []
    for tokens in (10_000, 100):
        with memory_of(job.student, tokens):
            trainer.run_step(job, STEP, {})
        found.append(gradient(job.student))
        job.student.zero_grad()
    assert (found[1] - found[0]).norm() / found[0].norm() < 2e-5


@pytest.mark.parametrize(
    "said",
    ["CUDA out of memory. Tried to allocate 2 GiB", "CUDA error: out of memory", "Triton Error [CUDA]: out of memory"],
)
def test_every_way_in_which_a_gpu_says_that_it_is_full_is_known(said: str) -> None:
    assert oom_retry.NO_MEMORY.search(said) and not oom_retry.NO_MEMORY.search(
        "CUDA error: device-side assert triggered"
    )
