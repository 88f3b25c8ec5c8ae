"""Wordings of captions, and the rule that decides whether a text describes a scene.

The rule is the truth that the demo's judge is measured by. It reads the words of color, shape and place, in their
order; other words ("a", "of", "there is") say nothing.
"""

import re
from functools import cache
from itertools import product

from masters.data.sources.captions import COLORS, SHAPES, Scene, Thing

WORDINGS = {
    "row": (
        "{a} left of {b}", "{b} right of {a}",
        "on the left {a}, on the right {b}", "on the right {b}, on the left {a}",
    ),
    "column": (
        "{a} above {b}", "{b} below {a}",
        "at the top {a}, at the bottom {b}", "at the bottom {b}, at the top {a}",
    ),
}  # fmt: skip
PLACES = ("left", "right", "above", "below", "top", "bottom")
TELLING = re.compile(rf"\b(?:{'|'.join([*COLORS, *SHAPES, *PLACES])})\b")


def captions_of(scene: Scene) -> list[str]:
    return [wording.format(a=scene.first, b=scene.second) for wording in WORDINGS[scene.layout]]


def telling(text: str) -> tuple[str, ...]:
    """Return the words of color, shape and place in a text."""
    return tuple(TELLING.findall(text.lower()))


@cache
def _scenes() -> dict[tuple[str, ...], Scene]:
    things = [Thing(*pair) for pair in product(COLORS, SHAPES)]
    every = [Scene(*parts) for parts in product(WORDINGS, things, things)]
    return {telling(caption): scene for scene in every for caption in captions_of(scene)}


def read(text: str) -> Scene | None:
    """Return the scene that a text describes; None if there is none or the text says more or less than one."""
    return _scenes().get(telling(text))


def describes(text: str, label: str) -> bool:
    """Return whether a text describes the scene of a label, in whatever words."""
    scene = read(text)
    return scene is not None and scene == read(label)
