"""The settings of the paper's equations, which the references of the tests compute."""

from typing import Any

from masters.config import Rewards, Train
from masters.config.presets import section_values


def paper_train(**values: Any) -> Train:
    """Return the section [train] of `preset = "paper"` with other values of some keys."""
    return Train(**{**section_values("paper", "train"), **values})


def paper_rewards(**values: Any) -> Rewards:
    """Return the section [rewards] of `preset = "paper"` with other values of some keys."""
    return Rewards(**{**section_values("paper", "rewards"), **values})
