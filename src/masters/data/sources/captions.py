"""Scenes of two drawn shapes, one beside or above the other, to be described in free text.

A scene says the place, color and shape of both things; a picture of it varies in size, place, shade and noise.
Scenes are split before any is drawn: no scene of the test questions is one of the training questions. Scenes of
`POOLS["teacher"]` are in no row of the data set: the demo's models are trained on them. The label is one short caption;
other texts describe the scene as well, so that rules which compare texts do not fit: a judge is asked.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

import numpy as np
from PIL import Image, ImageDraw

from masters.common.hashing import digest, to_unit_interval
from masters.data.sources.base import RawRow
from masters.data.sources.drawn_images import DrawnSource, encode_png

SIDE = 64  # pixels of a picture
SCALE = 4  # drawn larger, then reduced, for soft edges
COLORS = {
    "red": (210, 45, 40), "yellow": (225, 190, 40), "green": (50, 160, 60),
    "blue": (45, 80, 210), "purple": (140, 50, 160), "black": (35, 35, 35),
}  # fmt: skip
SHADE = 30  # by which each part of a color varies
CORNERS = {"circle": 32, "square": 4, "triangle": 3, "star": 10}
SHAPES = tuple(CORNERS)
RELATIONS = {"row": "left of", "column": "above"}  # of the first thing to the second, by layout
POOLS = ("teacher", "train", "test")
SHARES = {"teacher": 0.5, "train": 0.3, "test": 0.2}  # of the scenes
PICTURES = {"train": 6000, "test": 1500}  # of a data set's split, each with one question
QUESTION = "describe the picture."


@dataclass(frozen=True)
class Thing:
    """A colored shape."""

    color: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Two things that differ: in a row the first is on the left, in a column at the top."""

    layout: str
    first: Thing
    second: Thing

    @property
    def caption(self) -> str:
        """The label: "a red circle left of a blue star"."""
        return f"{self.first} {RELATIONS[self.layout]} {self.second}"


@cache
def pools() -> dict[str, list[Scene]]:
    """Return all 1,104 scenes by pool, each in exactly one."""
    found: dict[str, list[Scene]] = {name: [] for name in POOLS}
    things = [Thing(*pair) for pair in product(COLORS, SHAPES)]
    for layout, (first, second) in product(RELATIONS, permutations(things, 2)):
        scene = Scene(layout, first, second)
        found[_pool(scene)].append(scene)
    return found


def _pool(scene: Scene) -> str:
    place, bound = to_unit_interval(digest(f"captions/{scene.caption}".encode())), 0.0
    for name in POOLS[:-1]:
        bound += SHARES[name]
        if place < bound:
            return name
    return POOLS[-1]


def picture_of(rng: np.random.Generator, scene: Scene) -> Image.Image:
    """Draw a scene: 64 x 64 pixels RGB."""
    canvas = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE), _shade(rng, (225, 225, 225)))
    pen = ImageDraw.Draw(canvas)
    for thing, middle in zip((scene.first, scene.second), (17, 47), strict=True):
        place, across = middle + rng.uniform(-2, 2), 32 + rng.uniform(-3, 3)
        center = (place, across) if scene.layout == "row" else (across, place)
        outline = _outline(rng, thing.shape) + center
        pen.polygon([(x * SCALE, y * SCALE) for x, y in outline.tolist()], fill=_shade(rng, COLORS[thing.color]))
    reduced = np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX)).astype(float)
    noisy = reduced + rng.normal(0, rng.uniform(4, 12), reduced.shape)
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def _outline(rng: np.random.Generator, shape: str) -> np.ndarray:
    """Return the corners of a shape of random size around its middle, [corners, 2] in pixels."""
    number = np.arange(CORNERS[shape])
    angle = math.pi * (2 * number / CORNERS[shape] - (0.25 if shape == "square" else 0.5))
    radius = rng.uniform(8, 12) * (np.where(number % 2, 0.45, 1.15) if shape == "star" else 1)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def _shade(rng: np.random.Generator, color: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(round(part) for part in (color + rng.uniform(-SHADE, SHADE, 3)).clip(0, 255))


class CaptionsSource(DrawnSource):
    """6,000 training and 1,500 test questions, one a picture; `category` is the scene's layout."""

    def draw(self) -> list[RawRow]:
        rows = []
        for split, count in PICTURES.items():
            rng, scenes = np.random.default_rng([len(split), count]), pools()[split]
            for number in range(count):
                scene = scenes[int(rng.integers(len(scenes)))]
                image = encode_png(picture_of(rng, scene))
                rows.append(RawRow(f"{split}-{number}", image, QUESTION, scene.caption, split, scene.layout))
        return rows
