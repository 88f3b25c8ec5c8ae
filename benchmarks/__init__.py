"""What `masters bench NAME` measures: each case against what a user would write otherwise, in the same run."""

from collections.abc import Callable
from enum import StrEnum
from importlib import import_module

from masters.benchmarks.measure import Row


class Benchmark(StrEnum):
    HEAD = "head"
    MASK = "mask"
    STEP = "step"


def benchmark(name: Benchmark) -> Callable[[], list[Row]]:
    """The function that measures; its libraries are imported now."""
    return import_module(f"masters.benchmarks.{name}").measured
