"""What the ranks of a training run tell each other."""

from typing import TypeVar

import torch
import torch.distributed as dist

from masters.models.job import Job

T = TypeVar("T")


def gathered(job: Job, own: T) -> list[T]:
    """What every process has, in order of rank, on all of them."""
    if job.world == 1:
        return [own]
    everyone = [own] * job.world
    dist.all_gather_object(everyone, own)
    return everyone


def reduced(job: Job, sums: dict[str, float]) -> dict[str, float]:
    """Sum gradients and metrics over the processes: each already divided by the step's questions on all of them."""
    if job.world == 1:
        return sums
    parameters = list(job.student.parameters())
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)  # all at once: a message a parameter costs more than the step of a small model
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    everyone = gathered(job, sums)
    return {name: sum(one.get(name, 0.0) for one in everyone) for one in everyone for name in one}
