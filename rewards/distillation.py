"""Distillation reward: how easy a response is to distill, from the divergence of student and masked teacher (Eq. 6-7).

Shapes: G responses to one question. Nothing here has a gradient. Functions import torch, the module does not: the
command line and the scoring by rules import this package, and torch takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FLOORS = (1e-5, 0.0)  # ours: nats, and a multiple of the mean; differences of divergence up to these are noise


def distillation_rewards(
    divergence_G: torch.Tensor | Sequence[float],
    valid_G: torch.Tensor | Sequence[bool] | None = None,
    sequence_id_G: torch.Tensor | Sequence[int] | None = None,
    floors: tuple[float, float] = FLOORS,
) -> torch.Tensor:
    """Return (D_max - D_j) / (D_max - D_min), [G]: 1 for the easiest response to transfer, 0 for the hardest (Eq. 6-7).

    Ours: responses with equal `sequence_id_G` (identical tokens) share their mean divergence. All get 0 if
    D_max - D_min is at most the larger of floors[0] nats and floors[1] times the mean divergence. Responses outside
    `valid_G` (no verdict) or without a finite divergence do not count and get 0.
    """
    import torch

    d, valid = _prepare(divergence_G, valid_G, sequence_id_G)
    rewards = torch.zeros_like(d)
    if valid.any():
        highest, lowest = d[valid].max(), d[valid].min()
        if highest - lowest > max(floors[0], floors[1] * d[valid].mean().item()):
            rewards[valid] = (highest - d[valid]) / (highest - lowest)
    return rewards


def raw_distillation_rewards(
    divergence_G: torch.Tensor | Sequence[float],
    valid_G: torch.Tensor | Sequence[bool] | None = None,
    sequence_id_G: torch.Tensor | Sequence[int] | None = None,
) -> torch.Tensor:
    """Return -D_j, [G]: the ablation without normalization. Arguments as in `distillation_rewards`.

    The paper reports this ablation without a formula; the negative divergence is our reading.
    """
    import torch

    d, valid = _prepare(divergence_G, valid_G, sequence_id_G)
    return torch.where(valid, -d, torch.zeros_like(d))


def _prepare(divergence_G, valid_G, sequence_id_G) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a copy of the divergences, equal for identical responses, and which responses count, [G] each."""
    import torch

    d = torch.as_tensor(divergence_G).detach()
    d = d.clone() if d.is_floating_point() else d.float()
    valid = d.isfinite() if valid_G is None else d.isfinite() & torch.as_tensor(valid_G, dtype=torch.bool)
    if sequence_id_G is not None:
        ids = torch.as_tensor(sequence_id_G)
        for sequence_id in ids[valid].unique():
            identical = valid & (ids == sequence_id)
            d[identical] = d[identical].mean()
    return d, valid
