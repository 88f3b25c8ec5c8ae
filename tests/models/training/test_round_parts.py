"""A round whose mask stages are trained separately equals the round that is trained at once."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from masters.common.errors import ArtifactError
from masters.common.hashing import digest
from masters.config import Train
from masters.models.packing.prefix_tree import TokenCounts
from masters.models.training import checkpoint, guards, history, trainer
from masters.models.training.groups import Step
from masters.models.training.history import HistoryWriter
from masters.models.training.job import RoundPart
from masters.store import artifacts
from masters.store.artifacts import Identity
from masters.store.storage import Storage
from tests.models.mutation import Edit, mutate
from tests.models.tiny_contexts import make_context

STEPS, FIRST = 8, 4  # of the round, and of its first mask stage
WHOLE = RoundPart()
SECOND = tuple(range(4, 8))  # groups of the second mask stage


def training_of(folder: Path, checkpoints: str, steps: slice = slice(None), part: RoundPart = WHOLE, **train: Any):
    """Return a training of two mask stages of four steps each, or a part of it, and the list of its events."""
    events: list[Any] = []
    base = make_context("qwen3_vl")
    planned = [Step(n // FIRST, n % FIRST // 2, (0, 1, 2, 3) if n < FIRST else SECOND) for n in range(STEPS)]
    values = dict(learning_rate=1e-3, schedule="cosine", warmup_steps=2, max_gradient_norm=1.0) | train
    made = replace(
        base,
        student=copy.deepcopy(base.student),
        train=Train.model_validate(values),
        steps=planned[steps],
        ratios=[0.2, 0.0],
        storage=Storage(str(folder)),
        checkpoints=checkpoints,
        checkpoint_steps=3,
        report=events.append,
        history=HistoryWriter(),
        token_counts=TokenCounts(),
        part=part,
        probe=[base.question(group) for group in base.groups[:4]],
    )
    return made, events


def first_part(folder: Path, **train: Any):
    return training_of(folder, "one", slice(FIRST), RoundPart(steps_after=STEPS - FIRST, end_state="state"), **train)


def second_part(folder: Path, **train: Any):
    """The training of the second mask stage; the tables of the first are committed as an artifact before."""
    storage, made_of = Storage(str(folder)), Identity("train", 1, {}, {})
    if artifacts.find(storage, made_of) is None:
        content = next(history.files(storage, "one", "history"))
        storage.write(f"{made_of.folder}/history/0.parquet", content)
        artifacts.commit(storage, made_of, {"history/0.parquet": digest(content)}, {})
    part = RoundPart(steps_before=FIRST, start_state="state", earlier_parts=[made_of.folder])
    return training_of(folder, "two", slice(FIRST, None), part, **train)


def copy_weights(context: trainer.TrainContext) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in context.student.named_parameters()}


def differing_names(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


def read_rows(context: trainer.TrainContext, *prefixes: str) -> dict[str, list[dict]]:
    return {
        table: [
            row
            for prefix in prefixes
            for content in history.files(context.storage, prefix, table)
            for row in artifacts.tables.decode(content).to_pylist()
        ]
        for table in history.SCHEMAS
    }


SETTINGS = {  # with pi_ref in memory, with stored log-probabilities of pi_ref, with distillation only
    "masters": dict(),
    "stored": dict(kl="squared", negatives="clipped"),
    "kd": dict(objective="kd"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_parts_end_with_the_weights_and_tables_of_the_whole_round(name: str, tmp_path: Path) -> None:
    whole, _ = training_of(tmp_path / "whole", "one", **SETTINGS[name])
    trainer.fit(whole)
    trainer.fit(first_part(tmp_path / "parts", **SETTINGS[name])[0])
    two, events = second_part(tmp_path / "parts", **SETTINGS[name])
    trainer.fit(two)
    assert not [event for event in events if event.event == "resumed"]
    assert {(event.step, event.total) for event in events if event.event == "step"} == {
        (step, STEPS) for step in range(FIRST + 1, STEPS + 1)
    }
    assert differing_names(copy_weights(whole), copy_weights(two)) == set()
    assert read_rows(two, "one", "two") == read_rows(whole, "one")


FAULTS: dict[str, list[Edit]] = {
    "a learning rate by the part's own steps": [
        (trainer, "_take_step", "(context.train, number, context.round_steps)", "(context.train, number, 4)")
    ],
    "steps that start at 1 again": [
        (trainer, "restore_state", "steps_done = context.part.steps_before", "steps_done = 0")
    ],
    "a part that starts with the round's student": [
        (trainer, "restore_state", "elif context.part.start_state:", "elif False:")
    ],
    "an optimizer without its state": [
        (
            trainer,
            "save_end_state",
            "parameters, optimizer, context",
            "parameters, torch.optim.AdamW(parameters.values()), context",
        )
    ],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_notices_a_fault(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = training_of(tmp_path / "whole", "one")
    trainer.fit(whole)
    mutate(monkeypatch, FAULTS[fault])
    trainer.fit(first_part(tmp_path / "parts")[0])
    two, _ = second_part(tmp_path / "parts")
    try:
        trainer.fit(two)
    except ArtifactError:
        return  # the state is not that of the expected step
    assert differing_names(copy_weights(whole), copy_weights(two))


def test_the_end_state_of_a_part_equals_the_checkpoint_of_the_whole_round_at_that_step(tmp_path: Path) -> None:
    whole, _ = training_of(tmp_path / "whole", "one")
    whole.checkpoint_steps = FIRST
    trainer.fit(whole)
    trainer.fit(first_part(tmp_path / "parts")[0])
    expected, _ = checkpoint.newest(whole.storage, "one")
    end_state = checkpoint.read_end_state(Storage(str(tmp_path / "parts")), "state", FIRST)
    assert expected and expected.step == end_state.step == FIRST
    assert differing_names(expected.tensors, end_state.tensors) == set() and any(
        "adamw/" in name for name in end_state.tensors
    )


def interrupt_after(step: int) -> Callable[..., None]:
    """Return a `checkpoint.save` that interrupts training after it has saved this step."""
    original = checkpoint.save

    def save(storage: Storage, prefix: str, number: int, *state: Any) -> None:
        original(storage, prefix, number, *state)
        if number == step:
            raise KeyboardInterrupt

    return save


@pytest.mark.parametrize("cut", [3, FIRST, 6])
def test_an_interrupted_part_resumes_and_ends_with_the_same_result(cut: int, tmp_path: Path, monkeypatch) -> None:
    """It is interrupted after a checkpoint of either part, or after the end state but before the end of training."""
    whole, _ = training_of(tmp_path / "whole", "one")
    trainer.fit(whole)
    for part in (first_part, second_part):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", interrupt_after(cut))
            try:
                context, _ = part(tmp_path / "parts")
                trainer.fit(context)
            except KeyboardInterrupt:
                patch.undo()
                context, events = part(tmp_path / "parts")
                trainer.fit(context)
                assert [event.step for event in events if event.event == "resumed"] == [3 if cut <= FIRST else cut]
    assert differing_names(copy_weights(whole), copy_weights(context)) == set()
    assert read_rows(context, "one", "two") == read_rows(whole, "one")


@pytest.mark.parametrize(
    "damage", [lambda s, name: s.remove(name), lambda s, name: s.write(name, s.read(name)[:-1])], ids=["gone", "short"]
)
def test_a_damaged_end_state_is_refused(damage: Callable[[Storage, str], None], tmp_path: Path) -> None:
    trainer.fit(first_part(tmp_path)[0])
    context, _ = second_part(tmp_path)
    (name,) = context.storage.names("state")
    damage(context.storage, name)
    with pytest.raises(ArtifactError, match="expected the state after step 4, found none|expected SHA-256"):
        trainer.fit(context)


CORRECT = {  # correct answers to four probe questions by step; the step of the drop; the step of the best weights
    "the best weights are those of the previous part": ({0: 2, 1: 2, 2: 4, 3: 3, 4: 3, 5: 3, 6: 2}, 6, 2),
    "the best weights are those of the same part": ({0: 2, 1: 2, 2: 2, 3: 3, 4: 3, 5: 4, 6: 3, 7: 2}, 7, 5),
    "the drop is in the previous part": ({0: 4, 1: 4, 2: 3, 3: 2}, 3, 1),
}


@pytest.mark.parametrize("case", CORRECT)
def test_a_drop_is_detected_across_parts_and_rolls_back_to_the_best_weights_of_the_round(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    correct, at, to = CORRECT[case]
    guarded = dict(max_validation_drop=0.3, on_drop="rollback")
    monkeypatch.setattr(guards, "count_correct", lambda context: correct[context.history._step.get("step", 0)])
    whole, events = training_of(tmp_path / "whole", "one", **guarded)
    trainer.fit(whole)
    assert [(event.at, event.to) for event in events if event.event == "rolled_back"] == [(at, to)]
    context, events = first_part(tmp_path / "parts", **guarded)
    trainer.fit(context)
    if at > FIRST:
        context, events = second_part(tmp_path / "parts", **guarded)
        trainer.fit(context)
    else:
        assert context.storage.names("state") == []  # nothing follows
    assert [(event.at, event.to) for event in events if event.event == "rolled_back"] == [(at, to)]
    assert differing_names(copy_weights(whole), copy_weights(context)) == set()


def test_a_part_without_questions_passes_its_start_state_on(tmp_path: Path) -> None:
    trainer.fit(first_part(tmp_path, kl="squared")[0])
    part = RoundPart(steps_before=FIRST, steps_after=STEPS - FIRST, start_state="state", end_state="on")
    context, _ = training_of(tmp_path, "none", slice(0), part, kl="squared")
    context.groups, context.group_tokens = [], []
    trainer.fit(context)
    before, after = (checkpoint.read_end_state(context.storage, place, FIRST) for place in ("state", "on"))
    assert differing_names(before.tensors, after.tensors) == set()
