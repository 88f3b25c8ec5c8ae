"""Child processes report the memory and time that they took; real processes, small ones."""

from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import mask
from benchmarks.measure import make_memory_meter
from masters.execution import processes
from masters.execution.processes import Child, ProcessUsage


def make_children(folder: Path, *sizes: int) -> list[Child]:
    return [Child(f"child-{n}", "tests.memory_child", dict(mib=mib), folder) for n, mib in enumerate(sizes)]


@pytest.mark.parametrize(("max_running", "together"), [(1, 256), (2, 384), (3, 448)])
def test_the_peak_adds_the_largest_children_that_ran_together(tmp_path: Path, max_running: int, together: int) -> None:
    held = []
    small = processes.run(make_children(tmp_path / "small", 0), 1, lambda *_: None).peak_mib
    usage = processes.run(make_children(tmp_path, 64, 256, 128), max_running, lambda _, line: held.append(line["mib"]))
    assert sorted(held) == [64, 128, 256]  # and no line about peaks reaches the caller
    assert len(usage.startup_seconds) == 3
    assert usage.peak_mib == pytest.approx(together + max_running * small, abs=8 * max_running)


def test_no_children_take_nothing() -> None:
    assert processes.run([], 0, lambda *_: None) == ProcessUsage()


@pytest.mark.parametrize(
    "prepare", [mask.prepare_thresholds, pytest.param(mask.prepare_remask, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_masks_of_a_checkpoint_take_less_than_twice_its_largest_tensor(tmp_path: Path, dtype, prepare) -> None:
    """Among a hundred small ones: what is kept of each would add up."""
    mask.write_checkpoint(tmp_path, (4096, 16384 // dtype.itemsize), dtype, small_matrices=100)  # 64 MiB each
    assert make_memory_meter(partial(prepare, tmp_path))() < 2 * 64
