"""The learning rate of each optimizer step."""

import math

from masters.config import Train


def learning_rate(train: Train, step: int, steps: int) -> float:
    """Return the learning rate of step 1..`steps`: a linear warmup, then constant or decaying to 0 after the last step.

    The first warmup step has the rate learning_rate / warmup_steps, not 0. The paper's rate is constant.
    """
    if step <= train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    progress = (step - 1 - train.warmup_steps) / max(1, steps - train.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[
        train.schedule
    ]
    return train.learning_rate * factor
