"""Rewards (Eq. 6-8): is a response right, is it easy to pass on, and how it compares within its group."""

from masters.rewards.advantages import group_advantages
from masters.rewards.distillation import distillation_rewards, raw_distillation_rewards
from masters.rewards.rules import rule_accuracy

__all__ = ["distillation_rewards", "group_advantages", "raw_distillation_rewards", "rule_accuracy"]
