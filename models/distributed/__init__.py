"""Strategies to hold weights over the ranks of a training run, chosen by `runtime.sharding`; no part of any identity.

A strategy is one file with a class that implements `base.Sharding`.
"""

from masters.models.distributed.base import Sharding, to_local
from masters.models.distributed.replicate import Replicate

__all__ = ["Replicate", "Sharding", "make_sharding", "to_local"]


def make_sharding(strategy: str, device: str) -> Sharding:
    """Create the strategy "replicate" or "fsdp2" on this rank's device."""
    if strategy == "replicate":
        return Replicate(device)
    from masters.models.distributed.fsdp2 import Fsdp2  # imported here because it takes seconds

    return Fsdp2(device)
