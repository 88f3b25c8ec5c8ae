"""Guards of a whole run of tiny models: numbers that are none, and a fall on the probe."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from masters.common.errors import ArtifactError, MastersError
from masters.config import Train
from masters.models.packing.packed_batch import pack, response_states
from masters.models.packing.prefix_tree import Question
from masters.models.training import checkpoint, guards, history, trainer
from masters.models.training.groups import Group, Step
from masters.models.training.history import HistoryWriter
from masters.store.storage import Storage
from tests.models.tiny_jobs import make_job

STEPS = 6
CALM, WILD = 1e-4, 0.1  # learning rates: the second makes of any model one that is never right


def run_of(folder: Path, **train: Any) -> tuple[trainer.TrainContext, list[dict]]:
    """A run of six steps on a store of its own, from the same student; what it reports."""
    told: list[dict] = []
    job = make_job("qwen3_vl")
    values = dict(learning_rate=CALM, questions_per_step=4) | train
    made = replace(
        job,
        student=copy.deepcopy(job.student),
        train=Train.model_validate(values),
        steps=[Step(0, n // 2, (0, 1, 2, 3) if n % 2 == 0 else (4, 5, 6, 7)) for n in range(STEPS)],
        storage=Storage(str(folder)),
        checkpoints="checkpoints",
        checkpoint_steps=100,
        report=lambda **fields: told.append(fields),
        ledger=HistoryWriter(),
        probe=[],
    )
    probed(made)
    return made, told


def probed(job: trainer.TrainContext) -> None:
    """A probe that the student, as it is, has right: its labels are its own greedy answers."""
    with torch.no_grad():
        for group in job.groups[:4]:
            question = replace(job.question(group), responses=[[20]])
            states = response_states(job.student, pack([question], job.student, job.family))
            job.probe.append(replace(question, responses=[[int(states.logits()[0].argmax())]]))


def spoiling(question: Callable[[Group], Question], row: int, pixel: float) -> Callable[[Group], Question]:
    """Questions of which one has another image, a value of it being this."""

    def spoilt(group: Group) -> Question:
        made = question(group)
        if group.ref.row != row:
            return made
        pixels = made.prompt["pixel_values"].clone()
        pixels[0, 0] = pixel
        return replace(made, prompt=made.prompt | {"pixel_values": pixels})

    return spoilt


def weights(job: trainer.TrainContext) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in job.student.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def events(told: list[dict], kind: str) -> list[dict]:
    return [line for line in told if line["event"] == kind]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_loss_that_is_no_number_stops_before_the_update_and_names_the_question(tmp_path: Path, bad: float) -> None:
    """One question's image is broken; it shares rows with others, which a NaN behind a mask reaches."""
    job, told = run_of(tmp_path, beta=0.0)
    job.question = spoiling(job.question, 6, bad)
    states = [weights(job)]
    job.report = lambda **fields: (told.append(fields), states.append(weights(job)))
    with pytest.raises(MastersError, match=r"step 2, mask stage 0 \(ratio 0.2\), question q6: the loss is nan"):
        trainer.fit(job)
    assert [line["step"] for line in events(told, "step")] == [1]
    assert not same(states[0], states[-1]) and same(weights(job), states[-1])  # the first step's update, no other


def test_the_reference_pass_stops_at_what_is_no_number(tmp_path: Path) -> None:
    job, _ = run_of(tmp_path, kl="squared")
    job.question, job.token_budget = spoiling(job.question, 6, math.nan), 1
    with pytest.raises(MastersError, match="reference log-probabilities of question q6"):
        trainer.fit(job)
    assert not job.storage.names("checkpoints")


def test_a_gradient_that_is_no_number_stops_though_the_loss_is_one(tmp_path: Path) -> None:
    job, told = run_of(tmp_path)
    at: list[torch.Tensor] = []

    def spoil(_: torch.nn.Module, __: tuple, inputs: dict, out: Any) -> None:
        """Only what question 5's image makes."""
        if out.last_hidden_state.requires_grad and len(events(told, "step")) == 3:
            ids = inputs["input_ids"]
            own = job.question(job.groups[5]).ids_P
            row = [r for r in range(len(ids)) if torch.equal(ids[r, : len(own)], own)]
            if row:
                out.last_hidden_state.register_hook(lambda g: g.index_fill(0, torch.tensor(row), math.inf))
                at.append(out.last_hidden_state)

    job.student.model.register_forward_hook(spoil, with_kwargs=True)
    job.question = spoiling(job.question, 5, 0.0)  # an image of its own, so a row that is its own
    with pytest.raises(MastersError, match=r"step 4, .*question q5: the loss is -?\d.*the largest gradient (nan|inf)"):
        trainer.fit(job)
    assert at and len(events(told, "step")) == 3


def test_a_gradient_is_measured_by_its_largest_value() -> None:
    model = torch.nn.Linear(3, 2)
    assert guards.gradient_size(model.parameters()) == 0
    for values, expected in (([1.0, -3.0], 3.0), ([3e38, 3e38], 3e38), ([math.inf, 1.0], math.inf)):
        model.bias.grad = torch.tensor(values)
        assert guards.gradient_size(model.parameters()) == pytest.approx(expected)
    model.bias.grad = torch.tensor([1.0, math.nan])
    assert math.isnan(guards.gradient_size(model.parameters()))


def test_without_a_guard_a_fall_changes_nothing(tmp_path: Path) -> None:
    job, told = run_of(tmp_path, learning_rate=WILD)
    trainer.fit(job)
    assert len(events(told, "step")) == STEPS and not job.storage.names("checkpoints/best")
    assert not events(told, "rolled_back")


def test_a_drop_of_probe_accuracy_stops_training(tmp_path: Path) -> None:
    job, told = run_of(tmp_path, learning_rate=WILD, max_validation_drop=0.2)
    with pytest.raises(MastersError, match=r"step \d: the student has .* after 100.0% at step 0: a fall by more than"):
        trainer.fit(job)
    assert len(events(told, "step")) < STEPS


def test_a_fall_rolls_back_to_the_best_weights_and_ends(tmp_path: Path) -> None:
    job, told = run_of(tmp_path, learning_rate=WILD, max_validation_drop=0.2, on_drop="rollback")
    start = weights(job)
    trainer.fit(job)
    (back,) = events(told, "rolled_back")
    assert back["to"] == 0 and back["best"] == 1.0 and back["accuracy"] < 0.8
    assert len(events(told, "step")) == back["at"] < STEPS
    assert same(weights(job), start)


def test_a_guard_that_sees_no_fall_changes_no_weight(tmp_path: Path) -> None:
    found = []
    for train in ({}, dict(max_validation_drop=1.0, on_drop="rollback")):
        job, _ = run_of(tmp_path / str(len(found)), **train)
        trainer.fit(job)
        found.append(weights(job))
    assert same(*found)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_run_cut_short_falls_like_a_whole_one(tmp_path: Path, monkeypatch, cut: int, after: bool) -> None:
    """Cut right before and right after a checkpoint is there; the best weights of its step are written by then."""
    right = {0: 4, 1: 4, 2: 3, 3: 4, 4: 2}  # of four: a fall by more than 0.3 at step 4, the best weights at step 3
    monkeypatch.setattr(guards, "count_correct", lambda job: right[job.ledger._step.get("step", 0)])
    original, ends = checkpoint.save, []

    def cut_short(storage: Storage, prefix: str, step: int, *state: Any) -> None:
        if step != cut or after:
            original(storage, prefix, step, *state)
        if step == cut:
            raise KeyboardInterrupt

    for name in ("whole", "cut"):
        if name == "cut":
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(checkpoint, "save", cut_short)
                trainer.fit(run_of(tmp_path / name, max_validation_drop=0.3, on_drop="rollback")[0])
        job, told = run_of(tmp_path / name, max_validation_drop=0.3, on_drop="rollback")
        trainer.fit(job)
        (back,) = events(told, "rolled_back")
        assert (back["at"], back["to"], back["best"]) == (4, 3, 1.0)
        ends.append(weights(job))
    assert bool(events(told, "resumed")) == (cut > 1 or after)
    assert same(*ends)


@pytest.mark.parametrize("place", ["before any weight", "between two weights"])
def test_memory_that_does_not_hold_the_update_ends_the_run_which_goes_on_elsewhere(
    tmp_path: Path, monkeypatch, place: str
) -> None:
    original, taken, ends = torch.optim.AdamW.step, [], []

    def fails_at_3(self: torch.optim.AdamW) -> None:
        taken.append(0)
        if len(taken) == 3:
            for parameter in self.param_groups[0]["params"][: 2 * (place == "between two weights")]:
                parameter.data.add_(1.0)
            torch.empty(1 << 50)  # the allocator's own error
        original(self)

    for name in ("whole", "cut"):
        if name == "cut":
            job, told = run_of(tmp_path / name)
            job.checkpoint_steps = 1
            with monkeypatch.context() as patch, pytest.raises(MastersError, match="step 3: memory does not hold what"):
                patch.setattr(torch.optim.AdamW, "step", fails_at_3)
                trainer.fit(job)
            assert len(events(told, "step")) == 2 and not events(told, "token_budget")
        job, told = run_of(tmp_path / name)
        trainer.fit(job)
        assert [line["step"] for line in events(told, "resumed")] == ([2] if name == "cut" else [])
        ends.append(weights(job))
    assert same(*ends)


def test_other_errors_of_a_step_are_not_taken_for_lack_of_memory(tmp_path: Path, monkeypatch) -> None:
    def broken(_: torch.optim.AdamW) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        trainer.fit(run_of(tmp_path)[0])


@pytest.mark.parametrize(
    "settings", [{}, {"objective": "kd"}, {"learning_rate": WILD, "max_validation_drop": 0.2, "on_drop": "rollback"}]
)
def test_what_a_run_leaves_is_whole(tmp_path: Path, settings: dict) -> None:
    """As the train stage proves it before the record, also of a run that ended early."""
    job, told = run_of(tmp_path, **settings)
    trainer.fit(job)
    census = history.HistoryCheck()
    for table in history.SCHEMAS:
        for content in history.files(job.storage, job.checkpoints, table):
            census.count(table, content)
    rewarded = job.train.objective == "masters"
    back = events(told, "rolled_back")
    assert bool(back) == ("on_drop" in settings)
    census.check(back[0]["at"] if back else STEPS, rewarded)
    with pytest.raises(ArtifactError, match=f"each of {STEPS + 1} steps once"):
        census.check(STEPS + 1, rewarded)
