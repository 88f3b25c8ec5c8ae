"""Replication: every rank holds all weights; gradients are summed once a step, in one message."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from masters.config import Train
from masters.models.distributed import mixed_precision

T = TypeVar("T")


class Replicate:
    """Weights, gradients and optimizer states are whole on every rank (see `base.Sharding`)."""

    lockstep = False

    def __init__(self, device: str = "cpu") -> None:
        self._device = device

    def shard_model(self, model: torch.nn.Module, train: Train | None = None) -> torch.nn.Module:
        model.to(self._device)
        return mixed_precision.apply_autocast(model, train) if train else model

    def local_parameters(self, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        return dict(model.named_parameters())

    def run_with_full_weights(self, model: torch.nn.Module, function: Callable[[torch.nn.Module], T]) -> T:
        return function(model)

    def sum_gradients(self, model: torch.nn.Module) -> None:
        if not dist.is_initialized():
            return
        parameters = list(model.parameters())
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        dist.all_reduce(flat)  # in one message: one per parameter costs more than the step of a small model
        for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)

    def full_tensor(self, tensor: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        return tensor

    def shard(self, full: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        return full
