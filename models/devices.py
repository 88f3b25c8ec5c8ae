"""Which GPUs a process takes, so that none is taken twice. On a machine without one nothing here does anything."""

import os

import torch

from masters.common.errors import InputError
from masters.execution.processes import SLOT

VISIBLE = "CUDA_VISIBLE_DEVICES"


def of_rank(rank: int, world: int) -> str:
    """Whose device a training rank computes on. Raises InputError where ranks outnumber the GPUs: NCCL takes one rank
    a GPU."""
    if not torch.cuda.is_available():
        return "cpu"
    if world > (count := torch.cuda.device_count()):
        raise InputError(
            f"runtime.train_processes is {world}, expected one a GPU at most, found {count} GPUs: lower it to {count}"
        )
    torch.cuda.set_device(rank)
    return f"cuda:{rank}"


def claim(count: int) -> None:
    """Let this process see only its own `count` GPUs: those of its place among the processes that run together.

    To be called before CUDA is used. A process that nobody gave a place sees what it saw. Raises InputError where the
    machine has too few.
    """
    slot, there = os.environ.get(SLOT), torch.cuda.device_count()
    if slot is None or not there:
        return
    names = os.environ[VISIBLE].split(",") if VISIBLE in os.environ else list(map(str, range(there)))
    own = names[int(slot) * count : (int(slot) + 1) * count]
    if len(own) < count:
        raise InputError(
            f"expected {count} GPUs (runtime.tensor_parallel_size) for each engine that runs beside others "
            f"(runtime.generate_workers), found {there} for {int(slot) + 1} or more of them: lower one of the two"
        )
    os.environ[VISIBLE] = ",".join(own)
