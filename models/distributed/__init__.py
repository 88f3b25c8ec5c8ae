"""How weights are held over the ranks of a training run: chosen by `runtime.sharding`, no part of any identity.

A way is one file with a class that does what `base.Sharding` says.
"""

from masters.models.distributed.base import Sharding, to_local
from masters.models.distributed.replicate import Replicate

__all__ = ["Replicate", "Sharding", "sharding_of", "to_local"]


def sharding_of(way: str, device: str) -> Sharding:
    """The way of that name, on this rank's device."""
    if way == "replicate":
        return Replicate(device)
    from masters.models.distributed.fsdp2 import Fsdp2  # here: its import takes seconds

    return Fsdp2(device)
