"""The pipeline's stages, in order."""

from enum import StrEnum


class Stage(StrEnum):
    """A stage of the pipeline. Each stage needs the results of those before it."""

    DATA = "data"
    MASK = "mask"
    GENERATE = "generate"
    SCORE = "score"
    TRAIN = "train"
    EVALUATE = "evaluate"
    REGISTER = "register"


def stages_up_to(last: Stage) -> frozenset[Stage]:
    """Return all stages up to and including `last`."""
    order = list(Stage)
    return frozenset(order[: order.index(last) + 1])
