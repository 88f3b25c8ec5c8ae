"""Measure time and memory of two implementations in turn, so that a busy neighbor disturbs both."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from masters.common import machine


@dataclass(frozen=True)
class Row:
    """Medians of our implementation and of the baseline; `spread` holds the smallest and largest value of each."""

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
    """Call both in turn, each of which returns one measurement."""
    our_values, baseline_values = zip(*[(ours(), baseline()) for _ in range(repeats)], strict=True)
    return make_row(case, unit, our_values, baseline_values)


def make_row(case: str, unit: str, ours: Sequence[float], baseline: Sequence[float]) -> Row:
    """Return the row of measurements that were taken in turn."""
    spread = ((min(ours), max(ours)), (min(baseline), max(baseline)))
    return Row(case, statistics.median(ours), statistics.median(baseline), unit, spread)


def make_timer(work: Callable[[], object]) -> Callable[[], float]:
    """Return a function that measures the wall seconds of one call, with a GPU's work. Calls `work` once to warm up."""
    work()

    def measure() -> float:
        _synchronize()
        start = time.perf_counter()
        work()
        _synchronize()
        return time.perf_counter() - start

    return measure


def make_gpu_memory_meter(work: Callable[[], object]) -> Callable[[], float]:
    """Return a function that measures the MiB of all tensors on the GPU at the peak of one call."""

    def measure() -> float:
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 2**20

    return measure


def make_memory_meter(prepare: Callable[[], Callable[[], object]]) -> Callable[[], float]:
    """Return a function that measures the MiB that one call adds at its peak, in a fresh process.

    The call is of what `prepare` returns; memory that was held before does not count.
    """

    def measure() -> float:
        spawn = multiprocessing.get_context("spawn")
        receive, send = spawn.Pipe(duplex=False)
        process = spawn.Process(target=_send_peak, args=(prepare, send))
        process.start()
        send.close()  # otherwise `recv` would wait for a process that died
        peak = receive.recv()
        process.join()
        return peak

    return measure


def _send_peak(prepare: Callable[[], Callable[[], object]], send) -> None:
    work = prepare()
    machine.reset_peak_memory()  # imports have a peak too
    before = machine.peak_memory_mib()
    work()
    send.send(machine.peak_memory_mib() - before)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
