"""Clipping of a step's gradient to a global norm, however ranks hold the weights."""

import math

import torch

from masters.models.distributed.base import to_local
from masters.models.distributed.collectives import all_gather
from masters.models.training.context import TrainContext


@torch.no_grad()
def clip_gradient(job: TrainContext, limit: float) -> float:
    """Scale the student's gradient, in place, so that its Euclidean norm is at most `limit`. Returns the norm before.

    Where ranks hold shares of the weights, the norm is that of the whole gradient, the same on all ranks.
    """
    parameters = job.sharding.local_parameters(job.student).values()
    mine = [to_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    squared = sum(gradient.double().square().sum().item() for gradient in mine)
    norm = math.sqrt(sum(all_gather(job.world, squared)) if job.sharding.lockstep else squared)
    if norm > limit:
        for gradient in mine:
            gradient.mul_(limit / norm)
    return norm
