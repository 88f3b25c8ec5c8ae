"""Gradient clipping by the global norm, for whole and for sharded weights."""

import math

import torch

from masters.models.distributed.base import to_local
from masters.models.distributed.collectives import all_gather
from masters.models.training.context import TrainContext


@torch.no_grad()
def clip_gradient(context: TrainContext, limit: float) -> float:
    """Scale the student's gradient in place so that its Euclidean norm is at most `limit`. Returns the norm before.

    If ranks hold shares of the weights, the norm is that of the whole gradient, the same on all ranks.
    """
    parameters = context.sharding.local_parameters(context.student).values()
    gradients = [to_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    squared = sum(gradient.double().square().sum().item() for gradient in gradients)
    norm = math.sqrt(sum(all_gather(context.world, squared)) if context.sharding.lockstep else squared)
    if norm > limit:
        for gradient in gradients:
            gradient.mul_(limit / norm)
    return norm
