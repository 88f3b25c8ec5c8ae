"""Train the digit task's teacher, middle model and student from scratch: `make demo-models` gives the commands.

First the vision tower alone learns to read three handwritten digits; then the whole model learns to answer all
questions of a scene in steps (`demo.two_phases`). In a share of the answers one digit is changed and
everything after it follows from the changed one, so that the models compute from what they wrote, as large models do.
Training draws its own scenes from the digits of `POOLS["teacher"]`; the data set's digits are never read.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PreTrainedTokenizerFast

from demo import build, two_phases
from demo import train as packed
from masters.data.sources.digits import DIGITS, HEIGHT, POOLS, SLOT, WIDTH, Handwriting, load_handwriting, questions

SIZE = (HEIGHT, WIDTH)
HELD_OUT = 200  # digits, the last of the pool, never trained on: the progress is measured on them


@dataclass(frozen=True, kw_only=True)
class Recipe(two_phases.Recipe):
    """`digits` bounds the handwriting that a model sees."""

    digits: int
    distortion: float = 0.0  # of the digits' shapes
    changed: float = 0.35  # share of answers with a changed digit


RECIPES = {
    "teacher": Recipe(digits=len(POOLS["teacher"]) - HELD_OUT, eye_steps=1500, steps=700, distortion=1.0),
    "middle": Recipe(digits=450, eye_steps=900, steps=700, distortion=0.5),
    "student": Recipe(digits=150, eye_steps=800, steps=800),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer learned from every possible question and answer: each digit is one token."""
    every = [question for scene in np.ndindex(10, 10, 10) for question in questions(list(scene))]
    return build.tokenizer([text for q in every for text in (q.text, q.answer, q.steps)])


class Scenes:
    """Draws scenes of a pool of digits, as many at a time as asked for, shapes distorted at random."""

    size: ClassVar[tuple[int, int]] = SIZE
    attributes: ClassVar[int] = DIGITS
    choices: ClassVar[int] = 10

    def __init__(self, written: Handwriting, pool: range, distortion: float, seed: int) -> None:
        self.ink = torch.from_numpy(written.images[list(pool)]).float() / 255
        self.labels = torch.from_numpy(written.labels[list(pool)])
        self.distortion, self.source = distortion, torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> tuple[list[Image.Image], torch.Tensor]:
        """Draw pictures. Returns them and their digits [count, 3]."""
        chosen = torch.randint(len(self.ink), (count * DIGITS,), generator=self.source)
        slots = F.grid_sample(self.ink[chosen][:, None], self._places(len(chosen)), align_corners=False)
        row = torch.cat(list(slots.view(count, DIGITS, HEIGHT, SLOT).unbind(1)), -1)
        white = (255 * (1 - F.pad(row, (0, WIDTH - DIGITS * SLOT)))).round().byte().numpy()
        return [Image.fromarray(picture).convert("RGB") for picture in white], self.labels[chosen].view(count, DIGITS)

    def _places(self, count: int) -> torch.Tensor:
        """Return the position of each pixel of a slot in its digit, [count, HEIGHT, SLOT, 2] in [-1, 1]."""
        size, strength = self._uniform(count, 22, 31), self.distortion * self._uniform(count, 0, 1)
        stretch, shear = 1 + strength * self._uniform(count, -0.15, 0.15), strength * self._uniform(count, -0.3, 0.3)
        angle = self._uniform(count, -15, 15) * math.pi / 180
        x = torch.arange(SLOT) - (size / 2 + self._uniform(count, 0, 1) * (SLOT - size))[:, None]
        y = torch.arange(HEIGHT) - (size / 2 + self._uniform(count, 0, 1) * (HEIGHT - size))[:, None]
        x, y = torch.broadcast_tensors(x[:, None, :] + 0.5, y[:, :, None] + 0.5)
        cos, sin, shear = angle.cos()[:, None, None], angle.sin()[:, None, None], shear[:, None, None]
        turned = torch.stack([cos * x + sin * y + shear * y, cos * y - sin * x], -1)
        scaled = turned * 2 / torch.stack([size * stretch, size / stretch], -1)[:, None, None]
        waves = 0.12 * strength[:, None, None, None] * torch.randn(count, 2, 4, 4, generator=self.source)
        return scaled + F.grid_sample(waves, scaled, padding_mode="border", align_corners=False).permute(0, 2, 3, 1)

    def _uniform(self, count: int, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=self.source)


class Packer(packed.Packer):
    """Packs scenes whose questions are (question, answer in steps, answer with a changed digit)."""

    def taught(self, right: str, written: str) -> list[int]:
        """Return the labels of `written`. Its tokens up to and including the changed digit are not learned."""
        answer, labels = self.segment("", right)[1], list(self.segment("", written)[1])
        if right != written:
            changed = next(at for at, (x, y) in enumerate(zip(answer, labels, strict=False)) if x != y)
            labels[: changed + 1] = [packed.IGNORE] * (changed + 1)
        return labels


def changed_digit(rng: np.random.Generator, digits: list[int], kind: int, share: float) -> str:
    """Return the answer in steps to question `kind`, in a share of cases with one digit of the scene replaced."""
    replaced = list(digits)
    if rng.random() < share:
        replaced[rng.integers(DIGITS)] = int(rng.integers(10))
    return questions(replaced)[kind].steps


class Task(two_phases.Task):
    """All questions of a scene, in a share of the answers with a changed digit."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        written, pool = load_handwriting(), POOLS["teacher"]
        self.recipe = recipe
        self.scenes = Scenes(written, pool[: recipe.digits], recipe.distortion, seed)
        self.held = Scenes(written, pool[-HELD_OUT:], 0.0, seed + 1)

    def rows(self, packer: Packer, rng: np.random.Generator) -> list[tuple[Image.Image, list[tuple]]]:
        rows = []
        for picture, digits in zip(*self.scenes.draw(self.recipe.batch), strict=True):
            every = questions(digits.tolist())
            changed = self.recipe.changed
            written = [changed_digit(rng, digits.tolist(), kind, changed) for kind in range(len(every))]
            asked = zip(every, written, strict=True)
            rows.append((picture, [(q.text, text, packer.taught(q.steps, text)) for q, text in asked]))
        return rows

    @torch.no_grad()
    def score(self, model, packer: Packer, scenes: int = 320) -> float:
        """Return the share of answers in steps whose every token is the greedy choice."""
        right: list[bool] = []
        for _ in range(0, scenes, 32):
            rows = [
                (picture, [(q.text, q.steps) for q in questions(digits.tolist())])
                for picture, digits in zip(*self.held.draw(32), strict=True)
            ]
            _, hits = packed.loss_of(model, *packer(rows))
            lengths = [len(packer.segment(*pair)[1]) for _, asked in rows for pair in asked]
            right += [bool(part.all()) for part in hits.split(lengths)]
        return sum(right) / len(right)


def main() -> None:
    arguments = two_phases.parser(__doc__, RECIPES)
    arguments.add_argument("--distortion", type=float, help="of the digits' shapes")
    given = two_phases.parsed(arguments)
    recipe = two_phases.chosen(RECIPES[given.which], given, "distortion")
    folder = given.out / f"digits-{given.which}"
    two_phases.train(given, given.which, folder, recipe, tokenizer(), Task, Packer)


if __name__ == "__main__":
    main()
