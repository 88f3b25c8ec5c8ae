"""What the trainer asks of a way to hold weights over ranks."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from masters.common.errors import MastersError
from masters.config import Train
from masters.models.masking import BLOCK

T = TypeVar("T")


class Sharding(Protocol):
    """How a model's weights, gradients and optimizer states are held over ranks.

    `lockstep`: whether a forward or backward pass needs all ranks: then all take equally many.
    """

    lockstep: bool

    def shard_model(self, model: torch.nn.Module, train: Train | None = None) -> torch.nn.Module:
        """A model that every rank has whole, on the CPU, from now on held this way on the ranks' devices.

        With `train` its products are in `train.compute_dtype`, else in the type of its weights.
        """
        ...

    def local_parameters(self, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        """Its parameters as this rank holds them. What is put into them counts from the next pass on."""
        ...

    def within(self, model: torch.nn.Module, work: Callable[[torch.nn.Module], T]) -> T:
        """The result of `work`, a forward pass of `model`, in which every weight is a plain whole tensor.

        What shall be differentiated must be a tensor, or in a tuple of tensors. Without gradients `lm_head.weight`
        stays whole, after `work` too, until the next `held`.
        """
        ...

    def sum_gradients(self, model: torch.nn.Module) -> None:
        """After a step's passes: the gradients of what is held are the sums over the ranks from now on."""
        ...

    def full_tensor(self, part: torch.Tensor, like: torch.nn.Parameter) -> torch.Tensor:
        """A parameter that is held, its gradient or an optimizer's state of it, as a plain whole tensor of the model's
        shape. `like`: the parameter. All ranks ask together."""
        ...

    def shard(self, whole: torch.Tensor, like: torch.nn.Parameter) -> torch.Tensor:
        """What this rank holds of a whole tensor that is held as `like` is; it may share the whole's memory, and be
        where that is. No rank waits for another."""
        ...


def transformer_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks of the text model and of the vision tower."""
    return [module for name, module in model.named_modules() if BLOCK.fullmatch(f"{name}.")]


def check_gradient_sum(sharding: Sharding, way: str, device: str) -> None:
    """Raises MastersError unless a gradient that differs by rank comes out as the sum over the ranks."""
    world, rank = dist.get_world_size(), dist.get_rank() + 1
    linear = sharding.shard_model(
        torch.nn.Linear(1, 2 * world + 1, bias=False), Train()
    )  # nothing that ranks share evenly
    known = torch.full((1, 1), float(rank), device=device)
    sharding.within(linear, lambda itself: torch.nn.functional.linear(known, *itself.parameters())).sum().backward()
    sharding.sum_gradients(linear)
    [weight] = sharding.local_parameters(linear).values()
    assert weight.grad is not None
    found = to_local(weight.grad)
    expected = torch.full_like(found, world * (world + 1) / 2)
    if not torch.allclose(found, expected, rtol=1e-3):  # a wrong factor is far more, rounding far less
        raise MastersError(
            f"gradients of {world} ranks are to be summed: of 1 to {world} expected {expected.flatten()[0]:g}, found "
            f"{found.flatten().tolist()[:2]}: this backend ({dist.get_backend()}) cannot be trained on with "
            f'runtime.sharding = "{way}"; set it to "replicate"'
        )


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of a tensor, a DTensor or a plain one, as a plain one of the same memory."""
    shared = getattr(tensor, "to_local", None)  # no DTensor by name: its import takes seconds
    return shared() if shared else tensor
