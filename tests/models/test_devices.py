"""Which GPUs a process takes: rules alone, as there is no GPU here to take."""

import os

import pytest
import torch

from masters.common.errors import InputError
from masters.execution.processes import SLOT
from masters.models import devices


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Makes this machine say that it has so many, of which a setting may name some."""

    def have(count: int, slot: int | None, visible: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        for name, value in ((devices.VISIBLE_DEVICES, visible), (SLOT, slot)):
            monkeypatch.setenv(name, "")  # so that what is claimed is undone
            monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, str(value))

    return have


@pytest.mark.parametrize(
    ("count", "slot", "visible", "each", "own"),
    [
        (4, 0, None, 1, "0"),
        (4, 3, None, 1, "3"),
        (4, 1, None, 2, "2,3"),
        (2, 1, "GPU-a,GPU-b", 1, "GPU-b"),
        (4, None, None, 1, None),  # nobody gave it a place
        (0, 1, None, 1, None),
    ],
)
def test_engines_that_run_together_share_no_gpu(gpus, count, slot, visible, each, own) -> None:
    gpus(count, slot, visible)
    devices.claim_gpus(each)
    assert os.environ.get(devices.VISIBLE_DEVICES) == own


@pytest.mark.parametrize(("count", "slot", "each"), [(1, 1, 1), (4, 2, 2), (2, 0, 4)])
def test_an_engine_without_a_gpu_of_its_own_is_refused(gpus, count, slot, each) -> None:
    gpus(count, slot)
    with pytest.raises(InputError, match=rf"expected {each} GPUs .*found {count} for {slot + 1} or more"):
        devices.claim_gpus(each)


def test_a_rank_has_a_gpu_of_its_own(gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    gpus(0, None)
    assert devices.select_device(1, 2) == "cpu"
    gpus(2, None)
    assert [devices.select_device(rank, 2) for rank in range(2)] == ["cuda:0", "cuda:1"] and taken == [0, 1]
    with pytest.raises(InputError, match="train_processes is 3, expected at most one per GPU, found 2 GPUs: lower it"):
        devices.select_device(0, 3)
