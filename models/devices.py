"""Assignment of GPUs to processes, so that no GPU is used by two. Without a GPU these functions change nothing."""

import os

import torch

from masters.common.errors import InputError
from masters.execution.processes import SLOT

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


def select_device(rank: int, world: int) -> str:
    """Select and return the device of a training rank.

    Raises InputError if there are more ranks than GPUs: NCCL takes one rank per GPU.
    """
    if not torch.cuda.is_available():
        return "cpu"
    if world > (count := torch.cuda.device_count()):
        raise InputError(
            f"runtime.train_processes is {world}, expected at most one per GPU, found {count} GPUs: lower it to {count}"
        )
    torch.cuda.set_device(rank)
    return f"cuda:{rank}"


def claim_gpus(count: int) -> None:
    """Restrict this process to `count` GPUs of its own, by its slot among the processes that run at the same time.

    Call it before CUDA is used. A process without a slot keeps all visible GPUs. Raises InputError if the machine has
    too few.
    """
    slot, visible = os.environ.get(SLOT), torch.cuda.device_count()
    if slot is None or not visible:
        return
    names = os.environ[VISIBLE_DEVICES].split(",") if VISIBLE_DEVICES in os.environ else list(map(str, range(visible)))
    claimed = names[int(slot) * count : (int(slot) + 1) * count]
    if len(claimed) < count:
        raise InputError(
            f"expected {count} GPUs (runtime.tensor_parallel_size) for each of the engines that run at the same time "
            f"(runtime.generate_workers), found {visible} for {int(slot) + 1} or more engines: lower one of the two"
        )
    os.environ[VISIBLE_DEVICES] = ",".join(claimed)
