"""Rewards (Eq. 6-8): whether a response is right, how easy it is to distill, and how it compares within its group.

The public functions load on first use, so that scoring by rules needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from masters.rewards.advantages import group_advantages
    from masters.rewards.distillation import distillation_rewards

__all__ = ["distillation_rewards", "group_advantages"]

_MODULES = {"distillation_rewards": "distillation", "group_advantages": "advantages"}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
