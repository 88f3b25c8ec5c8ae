"""Where a training lies in its round, which may be trained in parts: a mask stage each. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Where a training lies in its round: by default it is all of it, else one of several that follow each other.

    `steps_before`, `steps_after`: the optimizer steps of the round before and after this part's. `handed_over`: prefix
    in the store of the state that the part before ended with. `hand_over`: where this part leaves its own, "" for the
    last one. `histories`: the artifacts of the parts before, in order.
    """

    steps_before: int = 0
    steps_after: int = 0
    handed_over: str = ""
    hand_over: str = ""
    histories: Sequence[str] = ()
