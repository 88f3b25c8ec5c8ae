"""What the trainer asks of a way to hold weights over ranks."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch.distributed.tensor import DTensor

from masters.config import Train
from masters.models.masking import BLOCK

T = TypeVar("T")


class Sharding(Protocol):
    """How a model's weights, gradients and optimiser states are held over ranks.

    `lockstep`: whether a forward or backward pass needs all ranks: then all take equally many.
    """

    lockstep: bool

    def hold(self, model: torch.nn.Module, train: Train | None = None) -> torch.nn.Module:
        """A model that every rank has whole, on the CPU, from now on held this way on the ranks' devices.

        With `train` its products are in `train.compute_dtype`, else in the type of its weights.
        """
        ...

    def held(self, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        """Its parameters as this rank holds them. What is put into them counts from the next pass on."""
        ...

    def within(self, model: torch.nn.Module, work: Callable[[torch.nn.Module], T]) -> T:
        """The result of `work`, a forward pass of `model`, in which every weight is a plain whole tensor.

        What shall be differentiated must be a tensor, or in a tuple of tensors. `lm_head.weight` stays whole until the
        backward pass is done; without gradients, until the next `held`.
        """
        ...

    def sum_gradients(self, model: torch.nn.Module) -> None:
        """After a step's passes: each gradient becomes the sum over the ranks, if it is not yet."""
        ...

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        """A parameter, a gradient or an optimiser's state as a plain whole tensor. All ranks ask together."""
        ...

    def part(self, whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """What this rank holds of a whole tensor that is held as `like` is; it may share the whole's memory, and be
        where that is. No rank waits for another."""
        ...


def transformer_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks of the text model and of the vision tower."""
    return [module for name, module in model.named_modules() if BLOCK.fullmatch(f"{name}.")]


def own(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of a tensor, as a plain one of the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
