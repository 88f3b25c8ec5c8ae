"""Benchmarks for `python -m benchmarks NAME`: each compares our code with what a user would write, in the same run."""

from collections.abc import Callable
from enum import StrEnum
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.measure import Row


class Benchmark(StrEnum):
    """Names of the benchmarks, from the quickest to the longest."""

    MASK = "mask"
    HEAD = "head"
    STEP = "step"
    ENGINE = "engine"
    END_TO_END = "end-to-end"
    SCALE = "scale"
    LARGE = "large"


def load_benchmark(name: Benchmark) -> "Callable[[], list[Row]]":
    """Import a benchmark's libraries and return the function that measures."""
    return import_module(f"benchmarks.{name.replace('-', '_')}").measure


def measure_on_gpu(name: Benchmark) -> "list[Row]":
    """Return further rows on a machine with a CUDA device, none elsewhere."""
    if name not in (Benchmark.HEAD, Benchmark.STEP):
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    return import_module("benchmarks.gpu").BENCHMARKS[name]()
