"""The pipeline's stages, in order."""

from enum import StrEnum


class Stage(StrEnum):
    """A stage of the pipeline; each needs those before it."""

    DATA = "data"
    MASK = "mask"
    GENERATE = "generate"
    SCORE = "score"
    TRAIN = "train"
    EVALUATE = "evaluate"
    REGISTER = "register"
