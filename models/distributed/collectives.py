"""What the ranks of a training run tell each other."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

from masters.models.distributed import Sharding

T = TypeVar("T")


def all_gather(world: int, own: T) -> list[T]:
    """What each of `world` processes has, in order of rank, on all of them."""
    if world == 1:
        return [own]
    everyone = [own] * world
    dist.all_gather_object(everyone, own)
    return everyone


def lockstep(sharding: Sharding, world: int, own: Iterable[T]) -> Iterator[T | None]:
    """This rank's items; where a pass needs all ranks, None as long as another rank still has one."""
    if not sharding.lockstep or world == 1:
        yield from own
        return
    waiting = iter(own)
    while True:
        item = next(waiting, None)
        left = torch.tensor(int(item is not None))
        dist.all_reduce(left)
        if not left:
            return
        yield item


def gather_to_rank0(
    sharding: Sharding, held: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU, on rank 0; none on the others, which hold one at a time. All ranks call it together.

    `parameters`: by the same names, what each tensor is of: the parameter itself, its gradient or a state of it.
    """
    first, found = _rank() == 0, {}
    for name, tensor in held.items():
        whole = sharding.full_tensor(tensor.detach(), parameters[name])
        if first:
            found[name] = whole.cpu().contiguous()
    return found


def broadcast_from_rank0(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of what rank 0 has, on every rank, one at a time. The others' own is not looked at."""
    if not dist.is_initialized():
        yield from tensors.items()
        return
    first, box = _rank() == 0, [[(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]]
    dist.broadcast_object_list(box, 0)
    for name, shape, dtype in box[0]:
        tensor = tensors[name].contiguous() if first else torch.empty(shape, dtype=dtype)
        dist.broadcast(tensor.reshape(-1).view(torch.uint8), 0)  # bytes: of whatever type, bit for bit
        yield name, tensor


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
