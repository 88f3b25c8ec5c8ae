"""Drawn shapes in the manner of easy-VQA, with every question that its templates allow.

A drawn image holds one shape on a pale ground. Questions are the training split's own forms; their answers
follow from what was drawn. `answer_for` is checked against all labels of the training split in the tests.
"""

import re

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64  # pixels, as in easy-VQA
SCALE = 2  # drawn larger, then reduced, for the same soft edges
COLORS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "teal": (0, 128, 128),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "brown": (165, 42, 42),
}
SHAPES = ("circle", "rectangle", "triangle")


def draw(rng: np.random.Generator) -> tuple[Image.Image, str, str]:
    """Draw one shape. Returns the 64 x 64 RGB image, the shape's name and its color's name."""
    shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
    ground = tuple(int(v) for v in rng.integers(225, 256, 3))
    image = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE), ground)
    width = int(rng.integers(8, 33))
    height = (
        int(rng.integers(8, 33)) if shape == "rectangle" else round(width * 0.866 if shape == "triangle" else width)
    )
    left = int(rng.integers(0, SIDE - width + 1)) * SCALE
    top = int(rng.integers(0, SIDE - height + 1)) * SCALE
    right, bottom = left + width * SCALE, top + height * SCALE
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=COLORS[color])
    elif shape == "rectangle":
        pen.rectangle((left, top, right, bottom), fill=COLORS[color])
    else:
        pen.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=COLORS[color])
    return image.resize((SIDE, SIDE), Image.Resampling.BILINEAR), str(shape), str(color)


def answer_for(question: str, shape: str, color: str) -> str | None:
    """Return the answer to an easy-VQA question about one shape, or None where the question does not fit it."""
    words = re.findall(r"[a-z]+", question)
    named = [w for w in words if w in COLORS or w in SHAPES]
    if words[0] == "what":
        wanted, given = (color, shape) if "color" in words else (shape, color)
        return wanted if not named or named == [given] else None
    negated = "not" in words or "no" in words
    return "yes" if (named[0] in (shape, color)) != negated else "no"
