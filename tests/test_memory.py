"""Child processes report what they took; real processes, small ones (this module is their program too)."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from masters import processes
from masters.benchmarks import mask
from masters.benchmarks.measure import extra_mib
from masters.processes import Child, Ran


def hold(job_file: Path) -> None:
    held = bytearray(json.loads(job_file.read_text())["mib"] << 20)
    processes.report(job_file, event="held", mib=len(held) >> 20)


def children(folder: Path, *sizes: int) -> list[Child]:
    return [Child(f"child-{n}", "tests.test_memory", dict(mib=mib), folder, {}) for n, mib in enumerate(sizes)]


@pytest.mark.parametrize(("at_once", "together"), [(1, 256), (2, 384), (3, 448)])
def test_the_peak_is_that_of_the_largest_that_ran_together(tmp_path: Path, at_once: int, together: int) -> None:
    said = []
    small = processes.run(children(tmp_path / "small", 0), 1, lambda *_: None).peak_mib
    ran = processes.run(children(tmp_path, 64, 256, 128), at_once, lambda _, line: said.append(line["mib"]))
    assert sorted(said) == [64, 128, 256]  # and no line about peaks reaches the caller
    assert len(ran.startup_seconds) == 3
    assert ran.peak_mib == pytest.approx(together + at_once * small, abs=8 * at_once)


def test_no_children_take_nothing() -> None:
    assert processes.run([], 0, lambda *_: None) == Ran()


@pytest.mark.parametrize("prepare", [mask.thresholds_of, mask.remask_of])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_masks_of_a_checkpoint_take_less_than_twice_its_largest_tensor(tmp_path: Path, dtype, prepare) -> None:
    """Among a hundred small ones: what is kept of each would add up."""
    mask.write_checkpoint(tmp_path, (4096, 16384 // dtype.itemsize), dtype, small=100)  # 64 MiB each
    assert extra_mib(partial(prepare, tmp_path))() < 2 * 64


if __name__ == "__main__":
    processes.child_main(hold)
