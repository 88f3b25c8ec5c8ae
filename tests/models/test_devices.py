"""Assignment of GPUs to processes, with a simulated number of GPUs."""

import os

import pytest
import torch

from masters.common.errors import InputError
from masters.execution.processes import SLOT
from masters.models import devices


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Returns a function that simulates a number of GPUs, a slot and CUDA_VISIBLE_DEVICES."""

    def simulate(count: int, slot: int | None, visible: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        for name, value in ((devices.VISIBLE_DEVICES, visible), (SLOT, slot)):
            monkeypatch.setenv(name, "")  # so that monkeypatch undoes what is claimed
            monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, str(value))

    return simulate


@pytest.mark.parametrize(
    ("count", "slot", "visible", "each", "claimed"),
    [
        (4, 0, None, 1, "0"),
        (4, 3, None, 1, "3"),
        (4, 1, None, 2, "2,3"),
        (2, 1, "GPU-a,GPU-b", 1, "GPU-b"),
        (4, None, None, 1, None),  # a process without a slot
        (0, 1, None, 1, None),
    ],
)
def test_engines_that_run_at_the_same_time_share_no_gpu(gpus, count, slot, visible, each, claimed) -> None:
    gpus(count, slot, visible)
    devices.claim_gpus(each)
    assert os.environ.get(devices.VISIBLE_DEVICES) == claimed


@pytest.mark.parametrize(("count", "slot", "each"), [(1, 1, 1), (4, 2, 2), (2, 0, 4)])
def test_an_engine_without_enough_gpus_is_refused(gpus, count, slot, each) -> None:
    gpus(count, slot)
    with pytest.raises(InputError, match=rf"expected {each} GPUs .*found {count} for {slot + 1} or more"):
        devices.claim_gpus(each)


def test_each_rank_selects_its_own_gpu(gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    gpus(0, None)
    assert devices.select_device(1, 2) == "cpu"
    gpus(2, None)
    assert [devices.select_device(rank, 2) for rank in range(2)] == ["cuda:0", "cuda:1"] and taken == [0, 1]
    with pytest.raises(InputError, match="train_processes is 3, expected at most one per GPU, found 2 GPUs: lower it"):
        devices.select_device(0, 3)
