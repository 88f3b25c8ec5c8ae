"""R_distill: how easy a response is to pass on, from its divergence between student and masked teacher (Eq. 6-7).

Shapes: G responses of one question. Nothing here has a gradient.
"""

from collections.abc import Sequence

import torch

FLOORS = (1e-5, 0.0)  # ours: nats, and a multiple of the mean; up to these, differences of divergence are noise


def distillation_rewards(
    divergence_G: torch.Tensor | Sequence[float],
    valid_G: torch.Tensor | Sequence[bool] | None = None,
    same_G: torch.Tensor | Sequence[int] | None = None,
    floors: tuple[float, float] = FLOORS,
) -> torch.Tensor:
    """(D_max - D_j) / (D_max - D_min): the easiest to transfer gets 1, the hardest 0, [G] (Eq. 6-7).

    Ours: responses that `same_G` gives one number (identical tokens) share their mean divergence. All get 0 if
    D_max - D_min is at most the larger of floors[0] nats and floors[1] times the mean divergence. Responses outside
    `valid_G` (no verdict) or without a finite divergence take no part and get 0.
    """
    d, valid = _prepared(divergence_G, valid_G, same_G)
    rewards = torch.zeros_like(d)
    if valid.any():
        highest, lowest = d[valid].max(), d[valid].min()
        if highest - lowest > max(floors[0], floors[1] * d[valid].mean().item()):
            rewards[valid] = (highest - d[valid]) / (highest - lowest)
    return rewards


def raw_distillation_rewards(
    divergence_G: torch.Tensor | Sequence[float],
    valid_G: torch.Tensor | Sequence[bool] | None = None,
    same_G: torch.Tensor | Sequence[int] | None = None,
) -> torch.Tensor:
    """-D_j, [G]: the ablation without normalization. Otherwise as `distillation_rewards`.

    The paper reports this ablation without a formula; the negative divergence is our reading.
    """
    d, valid = _prepared(divergence_G, valid_G, same_G)
    return torch.where(valid, -d, torch.zeros_like(d))


def _prepared(divergence_G, valid_G, same_G) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of the divergences, equal among identical responses, and which of them take part."""
    d = torch.as_tensor(divergence_G).detach()
    d = d.clone() if d.is_floating_point() else d.float()
    valid = d.isfinite() if valid_G is None else d.isfinite() & torch.as_tensor(valid_G, dtype=torch.bool)
    if same_G is not None:
        group = torch.as_tensor(same_G)
        for number in group[valid].unique():
            same = valid & (group == number)
            d[same] = d[same].mean()
    return d, valid
