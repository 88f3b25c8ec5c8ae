"""Guards of a run of tiny models: values that are not finite, and a drop of probe accuracy."""

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
from masters.models.training.job import TrainEvent
from masters.store.storage import Storage
from tests.models.tiny_contexts import make_context

STEPS = 6
CALM, WILD = 1e-4, 0.1  # learning rates: with the second no model answers any probe question correctly


def run_of(folder: Path, **train: Any) -> tuple[trainer.TrainContext, list[TrainEvent]]:
    """Return a run of six steps on its own store, always from the same student, and the list of its events."""
    events: list[TrainEvent] = []
    context = make_context("qwen3_vl")
    values = dict(learning_rate=CALM, questions_per_step=4) | train
    made = replace(
        context,
        student=copy.deepcopy(context.student),
        train=Train.model_validate(values),
        steps=[Step(0, n // 2, (0, 1, 2, 3) if n % 2 == 0 else (4, 5, 6, 7)) for n in range(STEPS)],
        storage=Storage(str(folder)),
        checkpoints="checkpoints",
        checkpoint_steps=100,
        report=events.append,
        history=HistoryWriter(),
        probe=[],
    )
    add_probe(made)
    return made, events


def add_probe(context: trainer.TrainContext) -> None:
    """Set a probe that the untrained student answers correctly: the labels are its own greedy choices."""
    with torch.no_grad():
        for group in context.groups[:4]:
            question = replace(context.question(group), responses=[[20]])
            states = response_states(context.student, pack([question], context.student, context.family))
            context.probe.append(replace(question, responses=[[int(states.logits()[0].argmax())]]))


def replace_pixel(question: Callable[[Group], Question], row: int, pixel: float) -> Callable[[Group], Question]:
    """Make questions as before, but with this value in the image of one of them."""

    def make_question(group: Group) -> Question:
        made = question(group)
        if group.ref.row != row:
            return made
        pixels = made.prompt["pixel_values"].clone()
        pixels[0, 0] = pixel
        return replace(made, prompt=made.prompt | {"pixel_values": pixels})

    return make_question


def weights(context: trainer.TrainContext) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in context.student.named_parameters()}


def are_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def of_kind(events: list[TrainEvent], kind: str) -> list[Any]:
    return [event for event in events if event.event == kind]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_non_finite_loss_stops_before_the_update_and_names_the_question(tmp_path: Path, bad: float) -> None:
    """The question shares rows with others, whose loss is NaN too, in spite of the attention mask."""
    context, events = run_of(tmp_path, beta=0.0)
    context.question = replace_pixel(context.question, 6, bad)
    states = [weights(context)]
    context.report = lambda event: (events.append(event), states.append(weights(context)))
    with pytest.raises(MastersError, match=r"step 2, mask stage 0 \(ratio 0.2\), question q6: the loss is nan"):
        trainer.fit(context)
    assert [event.step for event in of_kind(events, "step")] == [1]
    assert not are_equal(states[0], states[-1])  # the first step's update
    assert are_equal(weights(context), states[-1])  # no other


def test_the_reference_pass_stops_at_non_finite_values(tmp_path: Path) -> None:
    context, _ = run_of(tmp_path, kl="squared", beta=0.1)
    context.question, context.token_budget = replace_pixel(context.question, 6, math.nan), 1
    with pytest.raises(MastersError, match="reference log-probabilities of question q6"):
        trainer.fit(context)
    assert not context.storage.names("checkpoints")


def test_a_non_finite_gradient_stops_although_the_loss_is_finite(tmp_path: Path) -> None:
    context, events = run_of(tmp_path)
    at: list[torch.Tensor] = []

    def add_hook(_: torch.nn.Module, __: tuple, inputs: dict, out: Any) -> None:
        """Make the gradient of question 5 infinite."""
        if out.last_hidden_state.requires_grad and len(of_kind(events, "step")) == 3:
            ids = inputs["input_ids"]
            prompt = context.question(context.groups[5]).ids_P
            row = [r for r in range(len(ids)) if torch.equal(ids[r, : len(prompt)], prompt)]
            if row:
                out.last_hidden_state.register_hook(lambda g: g.index_fill(0, torch.tensor(row), math.inf))
                at.append(out.last_hidden_state)

    context.student.model.register_forward_hook(add_hook, with_kwargs=True)
    context.question = replace_pixel(context.question, 5, 0.0)  # no other question has its image, so it has its own row
    with pytest.raises(MastersError, match=r"step 4, .*question q5: the loss is -?\d.*the largest gradient (nan|inf)"):
        trainer.fit(context)
    assert at and len(of_kind(events, "step")) == 3


def test_a_gradient_is_measured_by_its_largest_value() -> None:
    model = torch.nn.Linear(3, 2)
    assert guards.gradient_size(model.parameters()) == 0
    for values, expected in (([1.0, -3.0], 3.0), ([3e38, 3e38], 3e38), ([math.inf, 1.0], math.inf)):
        model.bias.grad = torch.tensor(values)
        assert guards.gradient_size(model.parameters()) == pytest.approx(expected)
    model.bias.grad = torch.tensor([1.0, math.nan])
    assert math.isnan(guards.gradient_size(model.parameters()))


def test_without_a_guard_a_drop_changes_nothing(tmp_path: Path) -> None:
    context, events = run_of(tmp_path, learning_rate=WILD)
    trainer.fit(context)
    assert len(of_kind(events, "step")) == STEPS and not context.storage.names("checkpoints/best")
    assert not of_kind(events, "rolled_back")


def test_a_drop_of_probe_accuracy_stops_training(tmp_path: Path) -> None:
    context, events = run_of(tmp_path, learning_rate=WILD, max_validation_drop=0.2)
    with pytest.raises(
        MastersError, match=r"step \d: the student answers .* after 100.0% at step 0: a drop of more than"
    ):
        trainer.fit(context)
    assert len(of_kind(events, "step")) < STEPS


def test_a_drop_rolls_back_to_the_best_weights_and_ends(tmp_path: Path) -> None:
    context, events = run_of(tmp_path, learning_rate=WILD, max_validation_drop=0.2, on_drop="rollback")
    start = weights(context)
    trainer.fit(context)
    (back,) = of_kind(events, "rolled_back")
    assert back.to == 0 and back.best == 1.0 and back.accuracy < 0.8
    assert len(of_kind(events, "step")) == back.at < STEPS
    assert are_equal(weights(context), start)


def test_a_guard_without_a_drop_changes_no_weight(tmp_path: Path) -> None:
    found = []
    for train in ({}, dict(max_validation_drop=1.0, on_drop="rollback")):
        context, _ = run_of(tmp_path / str(len(found)), **train)
        trainer.fit(context)
        found.append(weights(context))
    assert are_equal(*found)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_an_interrupted_run_rolls_back_like_an_uninterrupted_one(
    tmp_path: Path, monkeypatch, cut: int, after: bool
) -> None:
    """It is interrupted right before or right after a checkpoint is written; the best weights are written before."""
    right = {0: 4, 1: 4, 2: 3, 3: 4, 4: 2}  # of four: a drop by more than 0.3 at step 4, the best weights at step 3
    monkeypatch.setattr(guards, "count_correct", lambda context: right[context.history._step.get("step", 0)])
    original, ends = checkpoint.save, []

    def interrupt(storage: Storage, prefix: str, step: int, *state: Any) -> None:
        if step != cut or after:
            original(storage, prefix, step, *state)
        if step == cut:
            raise KeyboardInterrupt

    for name in ("whole", "cut"):
        if name == "cut":
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(checkpoint, "save", interrupt)
                trainer.fit(run_of(tmp_path / name, max_validation_drop=0.3, on_drop="rollback")[0])
        context, events = run_of(tmp_path / name, max_validation_drop=0.3, on_drop="rollback")
        trainer.fit(context)
        (back,) = of_kind(events, "rolled_back")
        assert (back.at, back.to, back.best) == (4, 3, 1.0)
        ends.append(weights(context))
    assert bool(of_kind(events, "resumed")) == (cut > 1 or after)
    assert are_equal(*ends)


@pytest.mark.parametrize("place", ["before any weight", "between two weights"])
def test_running_out_of_memory_in_the_update_ends_the_run_which_can_be_resumed(
    tmp_path: Path, monkeypatch, place: str
) -> None:
    original, calls, ends = torch.optim.AdamW.step, [], []

    def fails_at_3(self: torch.optim.AdamW) -> None:
        calls.append(0)
        if len(calls) == 3:
            for parameter in self.param_groups[0]["params"][: 2 * (place == "between two weights")]:
                parameter.data.add_(1.0)
            torch.empty(1 << 50)  # the allocator's own error
        original(self)

    for name in ("whole", "cut"):
        if name == "cut":
            context, events = run_of(tmp_path / name)
            context.checkpoint_steps = 1
            with monkeypatch.context() as patch, pytest.raises(MastersError, match="step 3: memory does not hold what"):
                patch.setattr(torch.optim.AdamW, "step", fails_at_3)
                trainer.fit(context)
            assert len(of_kind(events, "step")) == 2 and not of_kind(events, "token_budget")
        context, events = run_of(tmp_path / name)
        trainer.fit(context)
        assert [event.step for event in of_kind(events, "resumed")] == ([2] if name == "cut" else [])
        ends.append(weights(context))
    assert are_equal(*ends)


def test_other_errors_of_a_step_are_raised_as_they_are(tmp_path: Path, monkeypatch) -> None:
    def broken(_: torch.optim.AdamW) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        trainer.fit(run_of(tmp_path)[0])


@pytest.mark.parametrize(
    "settings", [{}, {"objective": "kd"}, {"learning_rate": WILD, "max_validation_drop": 0.2, "on_drop": "rollback"}]
)
def test_the_tables_of_a_run_are_complete(tmp_path: Path, settings: dict) -> None:
    """The train stage checks this before it commits, also for a run that ended early."""
    context, events = run_of(tmp_path, **settings)
    trainer.fit(context)
    check = history.HistoryCheck()
    for table in history.SCHEMAS:
        for content in history.files(context.storage, context.checkpoints, table):
            check.add_file(table, content)
    rewarded = context.train.objective == "masters"
    back = of_kind(events, "rolled_back")
    assert bool(back) == ("on_drop" in settings)
    check.check(back[0].at if back else STEPS, rewarded)
    with pytest.raises(ArtifactError, match=f"each of {STEPS + 1} steps once"):
        check.check(STEPS + 1, rewarded)
