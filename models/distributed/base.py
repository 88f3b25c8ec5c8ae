"""The interface of a sharding strategy, as the trainer uses it."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from masters.common.errors import MastersError
from masters.config import Train
from masters.models.masking import BLOCK_NAME

T = TypeVar("T")


class Sharding(Protocol):
    """A way to hold a model's weights, gradients and optimizer states over ranks.

    `lockstep`: whether a forward or backward pass needs all ranks, which then run equally many passes.
    """

    lockstep: bool

    def shard_model(self, model: torch.nn.Module, train: Train | None = None) -> torch.nn.Module:
        """Move a model that every rank holds whole on the CPU to the ranks' devices, sharded by this strategy.

        With `train` its matrix products are in `train.compute_dtype`, else in the type of its weights.
        """
        ...

    def local_parameters(self, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        """Return this rank's part of the parameters, by name. Values written to them count from the next pass on."""
        ...

    def run_with_full_weights(self, model: torch.nn.Module, function: Callable[[torch.nn.Module], T]) -> T:
        """Call `function(model)` as a forward pass in which every weight is a plain full tensor.

        Results to differentiate must be a tensor or lie in a tuple of tensors. Without gradients `lm_head.weight` stays
        full after the call, until the next `local_parameters`.
        """
        ...

    def sum_gradients(self, model: torch.nn.Module) -> None:
        """Turn the gradients of this rank's parameters into sums over the ranks. Call it after a step's passes."""
        ...

    def full_tensor(self, tensor: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Gather a parameter, its gradient or an optimizer state of it to a plain tensor of the model's shape.

        A collective: all ranks call it together. `parameter`: the one that `tensor` belongs to.
        """
        ...

    def shard(self, full: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Return this rank's part of a full tensor that is sharded as `parameter` is. No communication.

        The part may share the full tensor's memory and lie on its device.
        """
        ...


def transformer_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the blocks of the text model and of the vision tower."""
    return [module for name, module in model.named_modules() if BLOCK_NAME.fullmatch(f"{name}.")]


def check_gradient_sum(sharding: Sharding, strategy: str, device: str) -> None:
    """Raises MastersError unless a gradient that differs by rank comes out as the sum over the ranks."""
    world, rank = dist.get_world_size(), dist.get_rank()
    # an odd number of rows: ranks cannot share them evenly
    linear = sharding.shard_model(torch.nn.Linear(1, 2 * world + 1, bias=False), Train())
    inputs = torch.full((1, 1), rank + 1.0, device=device)
    outputs = sharding.run_with_full_weights(
        linear, lambda full: torch.nn.functional.linear(inputs, *full.parameters())
    )
    outputs.sum().backward()
    sharding.sum_gradients(linear)
    [weight] = sharding.local_parameters(linear).values()
    assert weight.grad is not None
    found = to_local(weight.grad)
    expected = torch.full_like(found, world * (world + 1) / 2)
    if not torch.allclose(found, expected, rtol=1e-3):  # a wrong factor is far more, rounding far less
        raise MastersError(
            f"gradients of {world} ranks must be summed: of 1 to {world} expected {expected.flatten()[0]:g}, found "
            f"{found.flatten().tolist()[:2]}: this backend ({dist.get_backend()}) cannot be trained on with "
            f'runtime.sharding = "{strategy}"; set it to "replicate"'
        )


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor, or a plain tensor itself, as a plain tensor of the same memory."""
    convert = getattr(tensor, "to_local", None)  # DTensor is not imported here because that takes seconds
    return convert() if convert else tensor
