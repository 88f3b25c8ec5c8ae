"""Times and memory of two ways to do the same, taken turn by turn, so that a busy neighbor disturbs both."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from masters.common import machine


@dataclass(frozen=True)
class Row:
    """Medians of ours and of the baseline; `spread` is the smallest and largest of each."""

    case: str
    ours: float
    baseline: float
    unit: str
    spread: tuple[tuple[float, float], tuple[float, float]]

    def as_dict(self) -> dict:
        ratio = self.baseline / self.ours if self.ours else None
        return dict(
            case=self.case, ours=self.ours, baseline=self.baseline, unit=self.unit, ratio=ratio, spread=self.spread
        )


def compare(case: str, unit: str, ours: Callable[[], float], baseline: Callable[[], float], repeats: int) -> Row:
    """Call both in turn, each returning one measurement."""
    mine, theirs = zip(*[(ours(), baseline()) for _ in range(repeats)], strict=True)
    return medians(case, unit, mine, theirs)


def medians(case: str, unit: str, mine: Sequence[float], theirs: Sequence[float]) -> Row:
    """Of measurements that were taken in turn."""
    spread = ((min(mine), max(mine)), (min(theirs), max(theirs)))
    return Row(case, statistics.median(mine), statistics.median(theirs), unit, spread)


def once(case: str, unit: str, ours: float, baseline: float) -> Row:
    """A row of what was measured one time."""
    return medians(case, unit, [ours], [baseline])


def seconds(work: Callable[[], object]) -> Callable[[], float]:
    """Wall seconds of one call, a GPU's work included. It is called once before, unmeasured."""
    work()

    def measure() -> float:
        _wait()
        began = time.perf_counter()
        work()
        _wait()
        return time.perf_counter() - began

    return measure


def gpu_mib(work: Callable[[], object]) -> Callable[[], float]:
    """MiB that tensors hold on the GPU at the peak of one call, what was there before included."""

    def measure() -> float:
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 2**20

    return measure


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def extra_mib(prepare: Callable[[], Callable[[], object]]) -> Callable[[], float]:
    """MiB that one call of what `prepare` returns takes at its peak, above what was held before; in a fresh process."""

    def measure() -> float:
        spawn = multiprocessing.get_context("spawn")
        receive, send = spawn.Pipe(duplex=False)
        process = spawn.Process(target=_peak, args=(prepare, send))
        process.start()
        send.close()  # or a process that dies would be waited for
        found = receive.recv()
        process.join()
        return found

    return measure


def _peak(prepare: Callable[[], Callable[[], object]], send) -> None:
    work = prepare()
    machine.forget_peak()  # imports have one too
    before = machine.peak_mib()
    work()
    send.send(machine.peak_mib() - before)
