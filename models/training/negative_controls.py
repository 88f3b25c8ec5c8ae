"""Negative controls (ours): training with verdicts or advantages that say nothing about the responses.

A gain that remains with shuffled verdicts does not come from the verdicts (the distillation reward is still real); one
that remains with random advantages comes from neither reward. The table `rewards` holds the values trained on.
Shapes: G responses of one question.
"""

import numpy as np

from masters.common.hashing import digest
from masters.config import Rewards, Train
from masters.models.training.groups import Group


def verdicts(group: Group, train: Train) -> np.ndarray:
    """Return the verdicts R_acc that the group is trained with, float64 [G].

    Without a control these are its own; with "shuffled_verdicts" its own, permuted across its responses; with
    "random_advantages" standard normal numbers. Permutation and numbers depend on `train.seed` and the question's id
    only, so that they are the same in every epoch and in a resumed run.
    """
    if train.control == "none":
        return group.scores
    seed = digest(f"{train.control} {train.seed} {group.ref.question_id}".encode())
    rng = np.random.default_rng(int(seed, 16))
    if train.control == "shuffled_verdicts":
        return rng.permutation(group.scores)
    return rng.standard_normal(len(group.scores))


def rewards(configured: Rewards, train: Train) -> Rewards:
    """Return the rewards to train with: under "random_advantages" only the random numbers, in place of verdicts."""
    if train.control != "random_advantages":
        return configured
    return configured.model_copy(update=dict(accuracy="rules", distillation="off", combine="sum"))
