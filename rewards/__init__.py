"""Rewards (Eq. 6-8): is a response right, is it easy to pass on, and how it compares within its group.

Names load on first use: scoring by rules needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from masters.rewards.advantages import group_advantages
    from masters.rewards.combination import combined_rewards
    from masters.rewards.distillation import distillation_rewards, raw_distillation_rewards

__all__ = ["combined_rewards", "distillation_rewards", "group_advantages", "raw_distillation_rewards"]

_HOME = {
    "combined_rewards": "combination",
    "distillation_rewards": "distillation",
    "group_advantages": "advantages",
    "raw_distillation_rewards": "distillation",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
