"""Every rank holds everything; gradients are summed once a step, in one message."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from masters.config import Train
from masters.models.distributed import mixed_precision

T = TypeVar("T")


class Replicate:
    """Weights, gradients and optimizer states whole on every rank (see `base.Sharding`)."""

    lockstep = False

    def __init__(self, device: str = "cpu") -> None:
        self._device = device

    def shard_model(self, model: torch.nn.Module, train: Train | None = None) -> torch.nn.Module:
        model.to(self._device)
        return mixed_precision.computing(model, train) if train else model

    def local_parameters(self, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        return dict(model.named_parameters())

    def within(self, model: torch.nn.Module, work: Callable[[torch.nn.Module], T]) -> T:
        return work(model)

    def sum_gradients(self, model: torch.nn.Module) -> None:
        if not dist.is_initialized():
            return
        parameters = list(model.parameters())
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        dist.all_reduce(flat)  # all at once: a message a parameter costs more than the step of a small model
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def full_tensor(self, part: torch.Tensor, like: torch.nn.Parameter) -> torch.Tensor:
        return part

    def shard(self, whole: torch.Tensor, like: torch.nn.Parameter) -> torch.Tensor:
        return whole
