"""Combination of a response's accuracy and distillation rewards (Eq. 6-7).

Shapes: G responses to one question.
"""

import torch


def combined_rewards(accuracy_G: torch.Tensor, distillation_G: torch.Tensor, combine: str) -> torch.Tensor:
    """Return R, [G]. "sum": R_acc + R_distill (Eq. 6-7); "gated", ours: R_acc (1 + R_distill).

    With R_distill in [0, 1] a sum can rank a wrong response above a right one; gated, a wrong one (R_acc = 0) gets 0.
    """
    if combine == "gated":
        return accuracy_G * (1 + distillation_G)
    return accuracy_G + distillation_G
