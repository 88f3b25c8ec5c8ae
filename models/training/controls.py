"""Negative controls, ours: training whose verdicts or advantages say nothing about the responses.

A gain that remains with shuffled verdicts is not owed to the verdicts (the distillation reward is real), one that
remains with random advantages not to either reward. The table `rewards` holds what was trained on.
Shapes: G responses of one question.
"""

import numpy as np

from masters.common.hashing import digest
from masters.config import Rewards, Train
from masters.models.training.groups import Group


def verdicts(group: Group, train: Train) -> np.ndarray:
    """What the group is trained with as its verdicts R_acc, float64 [G].

    Its own; with "shuffled_verdicts" these permuted across its responses; with "random_advantages" standard normal
    numbers. Both follow from `train.seed` and the question's id, so that every epoch and a resumed run have the same.
    """
    if train.control == "none":
        return group.scores
    seed = digest(f"{train.control} {train.seed} {group.ref.question_id}".encode())
    rng = np.random.default_rng(int(seed, 16))
    if train.control == "shuffled_verdicts":
        return rng.permutation(group.scores)
    return rng.standard_normal(len(group.scores))


def rewards(given: Rewards, train: Train) -> Rewards:
    """What responses are rewarded for: under "random_advantages" the random numbers in the place of verdicts alone."""
    if train.control != "random_advantages":
        return given
    return given.model_copy(update=dict(accuracy="rules", distillation="off", combine="sum"))
