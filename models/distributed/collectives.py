"""Collectives over the ranks of a training run."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

from masters.models.distributed import Sharding

T = TypeVar("T")


def all_gather(world: int, value: T) -> list[T]:
    """Return the values of all `world` ranks, in order of rank, on every rank."""
    if world == 1:
        return [value]
    values = [value] * world
    dist.all_gather_object(values, value)
    return values


def lockstep(sharding: Sharding, world: int, items: Iterable[T]) -> Iterator[T | None]:
    """Yield this rank's items; where a pass needs all ranks, then None as long as another rank still has items."""
    if not sharding.lockstep or world == 1:
        yield from items
        return
    iterator = iter(items)
    while True:
        item = next(iterator, None)
        ranks_with_item = torch.tensor(int(item is not None))
        dist.all_reduce(ranks_with_item)
        if not ranks_with_item:
            return
        yield item


def gather_to_rank0(
    sharding: Sharding, tensors: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Gather full tensors on rank 0's CPU; other ranks return {} and hold one full tensor at a time.

    A collective: all ranks call it together. `parameters`: by the same names, the parameter that each tensor is, or is
    a gradient or an optimizer state of.
    """
    gathered = {}
    for name, tensor in tensors.items():
        full = sharding.full_tensor(tensor.detach(), parameters[name])
        if _rank() == 0:
            gathered[name] = full.cpu().contiguous()
    return gathered


def broadcast_from_rank0(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of rank 0's tensors on every rank, one at a time. Other ranks' `tensors` are ignored."""
    if not dist.is_initialized():
        yield from tensors.items()
        return
    headers = [[(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]]
    dist.broadcast_object_list(headers, 0)
    for name, shape, dtype in headers[0]:
        tensor = tensors[name].contiguous() if _rank() == 0 else torch.empty(shape, dtype=dtype)
        dist.broadcast(tensor.reshape(-1).view(torch.uint8), 0)  # as bytes, since backends do not know every type
        yield name, tensor


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
