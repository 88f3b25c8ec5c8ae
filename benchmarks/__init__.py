"""What `python -m benchmarks NAME` measures: each case against what a user would write otherwise, in the same run."""

from collections.abc import Callable
from enum import StrEnum
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.measure import Row


class Benchmark(StrEnum):
    """From the quickest to the longest."""

    MASK = "mask"
    HEAD = "head"
    STEP = "step"
    ENGINE = "engine"
    END_TO_END = "end-to-end"
    SCALE = "scale"
    LARGE = "large"


def benchmark(name: Benchmark) -> "Callable[[], list[Row]]":
    """The function that measures; its libraries are imported now."""
    return import_module(f"benchmarks.{name.replace('-', '_')}").measured


def gpu_rows(name: Benchmark) -> "list[Row]":
    """Further rows on a machine with a CUDA device, none elsewhere."""
    if name not in (Benchmark.HEAD, Benchmark.STEP):
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    return import_module("benchmarks.gpu").ROWS[name]()
