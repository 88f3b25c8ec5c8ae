"""A round whose mask stages are trained one after the other, each by itself, is the round that is trained at once."""

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
from masters.models.packing.prefix_tree import Sizes
from masters.models.training import checkpoint, guards, history, trainer
from masters.models.training.groups import Step
from masters.models.training.history import HistoryWriter
from masters.models.training.round_part import Part
from masters.store import artifacts
from masters.store.artifacts import Identity
from masters.store.storage import Storage
from tests.models.mutation import Edit, mutate
from tests.models.tiny_jobs import make_job

STEPS, FIRST = 8, 4  # of the round, and of its first mask stage
WHOLE = Part()
SECOND = tuple(range(4, 8))  # groups of the second mask stage


def job_of(folder: Path, checkpoints: str, steps: slice = slice(None), part: Part = WHOLE, **train: Any):
    """A training of two mask stages of four steps, or a part of it, and what it reports."""
    told: list[dict] = []
    base = make_job("qwen3_vl")
    planned = [Step(n // FIRST, n % FIRST // 2, (0, 1, 2, 3) if n < FIRST else SECOND) for n in range(STEPS)]
    values = dict(learning_rate=1e-3, schedule="cosine", warmup_steps=2, max_gradient_norm=1.0) | train
    made = replace(
        base, student=copy.deepcopy(base.student), train=Train.model_validate(values), steps=planned[steps],
        ratios=[0.2, 0.0], storage=Storage(str(folder)), checkpoints=checkpoints, checkpoint_steps=3,
        report=lambda **fields: told.append(fields), ledger=HistoryWriter(), tally=Sizes(), part=part,
        probe=[base.question(group) for group in base.groups[:4]],
    )  # fmt: skip
    return made, told


def first_part(folder: Path, **train: Any):
    return job_of(folder, "one", slice(FIRST), Part(steps_after=STEPS - FIRST, hand_over="handed"), **train)


def second_part(folder: Path, **train: Any):
    """The training that goes on; the tables of the one before are kept as an artifact, as the stage keeps them."""
    storage, made_of = Storage(str(folder)), Identity("train", 1, {}, {})
    if artifacts.find(storage, made_of) is None:
        content = next(history.files(storage, "one", "history"))
        storage.write(f"{made_of.folder}/history/0.parquet", content)
        artifacts.commit(storage, made_of, {"history/0.parquet": digest(content)}, {})
    part = Part(steps_before=FIRST, handed_over="handed", histories=[made_of.folder])
    return job_of(folder, "two", slice(FIRST, None), part, **train)


def weights(job: trainer.TrainContext) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in job.student.named_parameters()}


def differ(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


def rows(job: trainer.TrainContext, *prefixes: str) -> dict[str, list[dict]]:
    return {
        table: [
            row for prefix in prefixes for content in history.files(job.storage, prefix, table)
            for row in artifacts.tables.decode(content).to_pylist()
        ]
        for table in history.SCHEMAS
    }  # fmt: skip


WAYS = {  # pi_ref is held, or its numbers are stored; distillation alone
    "masters": dict(),
    "stored": dict(kl="squared", negatives="clipped"),
    "kd": dict(objective="kd"),
}


@pytest.mark.parametrize("way", WAYS)
def test_parts_end_with_the_weights_and_tables_of_the_whole(way: str, tmp_path: Path) -> None:
    whole, _ = job_of(tmp_path / "whole", "one", **WAYS[way])
    trainer.fit(whole)
    trainer.fit(first_part(tmp_path / "parts", **WAYS[way])[0])
    two, told = second_part(tmp_path / "parts", **WAYS[way])
    trainer.fit(two)
    assert not [line for line in told if line["event"] == "resumed"]
    assert {(line["step"], line["of"]) for line in told if line["event"] == "step"} == {
        (step, STEPS) for step in range(FIRST + 1, STEPS + 1)
    }
    assert differ(weights(whole), weights(two)) == set()
    assert rows(two, "one", "two") == rows(whole, "one")


FAULTS: dict[str, list[Edit]] = {
    "a learning rate by the part's own steps": [
        (trainer, "fit", "learning_rate(job.train, number, job.round_steps)", "learning_rate(job.train, number, 4)")
    ],
    "steps that begin at one again": [(trainer, "start", "done = job.part.steps_before", "done = 0")],
    "a part that begins with the round's student": [(trainer, "start", "elif job.part.handed_over:", "elif False:")],
    "an optimizer that begins anew": [
        (trainer, "hand_over", "parameters, optimizer, job", "parameters, torch.optim.AdamW(parameters.values()), job")
    ],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_notices_a_fault(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = job_of(tmp_path / "whole", "one")
    trainer.fit(whole)
    mutate(monkeypatch, FAULTS[fault])
    trainer.fit(first_part(tmp_path / "parts")[0])
    two, _ = second_part(tmp_path / "parts")
    try:
        trainer.fit(two)
    except ArtifactError:
        return  # the state is not that of the step that is asked for
    assert differ(weights(whole), weights(two))


def test_the_state_between_two_parts_is_the_checkpoint_of_the_whole_at_that_step(tmp_path: Path) -> None:
    whole, _ = job_of(tmp_path / "whole", "one")
    whole.checkpoint_steps = FIRST
    trainer.fit(whole)
    trainer.fit(first_part(tmp_path / "parts")[0])
    expected, _ = checkpoint.newest(whole.storage, "one")
    handed = checkpoint.handed_over(Storage(str(tmp_path / "parts")), "handed", FIRST)
    assert expected and expected.step == handed.step == FIRST
    assert differ(expected.tensors, handed.tensors) == set() and any("adamw/" in name for name in handed.tensors)


def cut_after(step: int) -> Callable[..., None]:
    """A way to save that is cut short once it has saved this step's checkpoint."""
    original = checkpoint.save

    def save(storage: Storage, prefix: str, number: int, *state: Any) -> None:
        original(storage, prefix, number, *state)
        if number == step:
            raise KeyboardInterrupt

    return save


@pytest.mark.parametrize("cut", [3, FIRST, 6])
def test_a_part_cut_short_goes_on_and_ends_the_same(cut: int, tmp_path: Path, monkeypatch) -> None:
    """Behind a checkpoint of either part, and where the state was handed over and nothing was told of it yet."""
    whole, _ = job_of(tmp_path / "whole", "one")
    trainer.fit(whole)
    for part in (first_part, second_part):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", cut_after(cut))
            try:
                job, _ = part(tmp_path / "parts")
                trainer.fit(job)
            except KeyboardInterrupt:
                patch.undo()
                job, told = part(tmp_path / "parts")
                trainer.fit(job)
                assert [line["step"] for line in told if line["event"] == "resumed"] == [3 if cut <= FIRST else cut]
    assert differ(weights(whole), weights(job)) == set()
    assert rows(job, "one", "two") == rows(whole, "one")


@pytest.mark.parametrize(
    "damage", [lambda s, name: s.remove(name), lambda s, name: s.write(name, s.read(name)[:-1])], ids=["gone", "short"]
)
def test_a_state_that_is_not_what_was_left_is_refused(damage: Callable[[Storage, str], None], tmp_path: Path) -> None:
    trainer.fit(first_part(tmp_path)[0])
    job, _ = second_part(tmp_path)
    (name,) = job.storage.names("handed")
    damage(job.storage, name)
    with pytest.raises(ArtifactError, match="expected the state after step 4, found none|expected SHA-256"):
        trainer.fit(job)


RIGHT = {  # of four probe questions, by step: where the fall is, and the step of the best weights
    "the best weights are of the part before": ({0: 2, 1: 2, 2: 4, 3: 3, 4: 3, 5: 3, 6: 2}, 6, 2),
    "the best weights are its own": ({0: 2, 1: 2, 2: 2, 3: 3, 4: 3, 5: 4, 6: 3, 7: 2}, 7, 5),
    "the part before falls": ({0: 4, 1: 4, 2: 3, 3: 2}, 3, 1),
}


@pytest.mark.parametrize("case", RIGHT)
def test_a_fall_is_seen_across_parts_and_ends_with_the_best_weights_of_the_round(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, at, to = RIGHT[case]
    watched = dict(max_validation_drop=0.3, on_drop="rollback")
    monkeypatch.setattr(guards, "count_correct", lambda job: right[job.ledger._step.get("step", 0)])
    whole, told = job_of(tmp_path / "whole", "one", **watched)
    trainer.fit(whole)
    assert [(line["at"], line["to"]) for line in told if line["event"] == "rolled_back"] == [(at, to)]
    job, told = first_part(tmp_path / "parts", **watched)
    trainer.fit(job)
    if at > FIRST:
        job, told = second_part(tmp_path / "parts", **watched)
        trainer.fit(job)
    else:
        assert job.storage.names("handed") == []  # nothing follows
    assert [(line["at"], line["to"]) for line in told if line["event"] == "rolled_back"] == [(at, to)]
    assert differ(weights(whole), weights(job)) == set()


def test_a_part_without_questions_hands_on_what_it_was_handed(tmp_path: Path) -> None:
    trainer.fit(first_part(tmp_path, kl="squared")[0])
    part = Part(steps_before=FIRST, steps_after=STEPS - FIRST, handed_over="handed", hand_over="on")
    job, _ = job_of(tmp_path, "none", slice(0), part, kl="squared")
    job.groups, job.sizes = [], []
    trainer.fit(job)
    before, after = (checkpoint.handed_over(job.storage, place, FIRST) for place in ("handed", "on"))
    assert differ(before.tensors, after.tensors) == set()
