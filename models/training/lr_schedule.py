"""The learning rate of each optimizer step."""

import math

from masters.config import Train


def learning_rate(train: Train, step: int, steps: int) -> float:
    """Learning rate of step 1..`steps`: a linear warmup, then constant, or falling to 0 behind the last step.

    The first warmup step already learns: its rate is learning_rate / warmup_steps. The paper's rate is constant.
    """
    if step <= train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    share = (step - 1 - train.warmup_steps) / max(1, steps - train.warmup_steps)  # of the decay that is behind it
    factor = {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}[train.schedule]
    return train.learning_rate * factor
