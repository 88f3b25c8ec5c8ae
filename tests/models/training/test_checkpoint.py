"""A resumed run equals an uninterrupted one, bit for bit; a damaged checkpoint is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from masters.common.errors import ArtifactError
from masters.models.training import checkpoint, reference_policy
from masters.store import tables
from masters.store.storage import Storage

STEPS = 7


class Training:
    """Training of a model with dropout and a layer that only some steps use, so that AdamW's step counts differ."""

    def __init__(self, used: tuple[bool, ...]) -> None:
        torch.manual_seed(5)
        self.often, self.seldom, self.frozen = (torch.nn.Linear(4, 4) for _ in range(3))
        self.frozen.requires_grad_(False)
        modules = torch.nn.ModuleDict(dict(often=self.often, seldom=self.seldom, frozen=self.frozen))
        self.parameters, self.used = dict(modules.named_parameters()), used
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.1, weight_decay=0.0)

    def steps(self, first: int, last: int, after: Callable[[int], None] = lambda step: None) -> list[float]:
        """Take the steps `first` to `last`; the losses."""
        losses = []
        for step in range(first, last + 1):
            x = torch.nn.functional.dropout(torch.full((2, 4), float(step)), 0.5)
            x = self.often(self.frozen(x))
            loss = (self.seldom(x) if self.used[step - 1] else x).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            after(step)
        return losses

    def save(self, storage: Storage, step: int) -> None:
        checkpoint.save(storage, "c", step, self.parameters, self.optimizer)

    def restore(self, storage: Storage) -> int:
        found, _ = checkpoint.newest(storage, "c")
        assert found
        checkpoint.restore(found, self.parameters, self.optimizer)
        return found.step


@given(used=st.tuples(*[st.booleans()] * STEPS), at=st.integers(1, STEPS - 1))
def test_losses_and_weights_after_a_resume_equal_those_of_an_uninterrupted_run(
    used: tuple[bool, ...], at: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    storage = Storage(str(tmp_path_factory.mktemp("s")))
    uninterrupted, interrupted, resumed = (Training(used) for _ in range(3))
    torch.manual_seed(6)
    expected = uninterrupted.steps(1, STEPS)
    torch.manual_seed(6)
    before = interrupted.steps(1, at)
    interrupted.save(storage, at)
    torch.manual_seed(99)
    assert resumed.restore(storage) == at
    assert before + resumed.steps(at + 1, STEPS) == expected
    assert all(
        torch.equal(uninterrupted.parameters[name], resumed.parameters[name]) for name in uninterrupted.parameters
    )


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A store in which three checkpoints were saved, each after a part file of a table."""
    storage, training = Storage(str(tmp_path)), Training((True,) * STEPS)

    def keep(step: int) -> None:
        storage.write(f"c/history-{step:08d}-0000.parquet", tables.encode([], tables.HISTORY))
        training.save(storage, step)

    training.steps(1, 3, keep)
    return storage


def names(storage: Storage) -> list[str]:
    return [name for name in storage.names("c") if "/step-" in name]


def test_the_last_two_checkpoints_are_kept(storage: Storage) -> None:
    assert [name.split("-")[1] for name in names(storage)] == ["00000002", "00000003"]


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: b""]
)
def test_a_damaged_checkpoint_is_refused_with_the_reason_and_the_previous_one_is_used(
    damage: Callable[[bytes], bytes], storage: Storage
) -> None:
    before, last = names(storage)
    storage.write(last, damage(storage.read(last)))
    with pytest.raises(ArtifactError, match="damaged"):
        checkpoint.read(storage, last)
    found, [reason] = checkpoint.newest(storage, "c")
    assert found and found.name == before and found.step == 2
    assert last in reason and "expected SHA-256" in reason
    assert names(storage) == [before]


def test_a_checkpoint_whose_rows_are_missing_is_refused(storage: Storage) -> None:
    """An interrupted removal leaves such a checkpoint; the tables would lack these rows."""
    storage.remove("c/history-00000003-0000.parquet")
    found, [reason] = checkpoint.newest(storage, "c")
    assert found and found.step == 2 and "history-00000003-0000.parquet" in reason


def test_without_a_valid_checkpoint_training_starts_from_the_beginning(storage: Storage) -> None:
    storage.remove("c/history-00000001-0000.parquet")
    found, refused = checkpoint.newest(storage, "c")
    assert found is None and len(refused) == 2 and names(storage) == []


def test_a_file_with_another_name_is_no_checkpoint(storage: Storage) -> None:
    for name in names(storage):
        storage.copy(name, "c/step-00000009.safetensors")
        storage.remove(name)
    assert checkpoint.newest(storage, "c") == (None, [])


@given(st.lists(st.lists(st.floats(-30, 0, width=32), max_size=4), min_size=1, max_size=20))
def test_reference_log_probabilities_are_stored_in_two_tensors(values: list[list[float]]) -> None:
    """One tensor for each group would make a header that safetensors refuses at little more than a million."""
    found = {group: torch.tensor(logps, dtype=torch.float32) for group, logps in enumerate(values)}
    data = reference_policy._encode(found)
    assert len(data) < 500 + 4 * sum(map(len, values)) + 8 * len(values)
    back = reference_policy._decode(data)
    assert back.keys() == found.keys() and all(torch.equal(back[group], logps) for group, logps in found.items())
