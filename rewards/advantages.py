"""Advantages of responses within their group (Eq. 8).

Shapes: G responses to one question. Nothing here has a gradient. Functions import torch, the module does not: the
command line and the scoring by rules import this package, and torch takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NOISE_FLOOR = 1e-4  # ours: a standard deviation up to this is rounding noise


def group_advantages(reward_G: torch.Tensor | Sequence[float], baseline_shift: float = 0.0) -> torch.Tensor:
    """Return A_j = (R_j - (mean R + shift)) / std R with the population's standard deviation, [G] (Eq. 8).

    Ours: a response without a verdict (NaN) does not count in mean and deviation, and its advantage is 0. All
    advantages are 0 if std R <= 1e-4 or fewer than two responses have a verdict; there is no other epsilon. A shift
    other than 0 is in units of the reward (AsymRE, arXiv 2506.20520).
    """
    import torch

    rewards = torch.as_tensor(reward_G).detach()
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    valid = ~rewards.isnan()
    advantages = torch.zeros_like(rewards)
    if valid.sum() >= 2:
        deviation = rewards[valid].std(correction=0)
        if deviation > NOISE_FLOOR:
            advantages[valid] = (rewards[valid] - rewards[valid].mean() - baseline_shift) / deviation
    return advantages
