"""Rewards (Eq. 6-8): whether a response is right, how easy it is to distill, and how it compares within its group."""

from masters.rewards.advantages import group_advantages
from masters.rewards.distillation import distillation_rewards

__all__ = ["distillation_rewards", "group_advantages"]
