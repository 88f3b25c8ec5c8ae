"""Train the caption task's teacher and student from scratch: `make demo-models` gives the commands.

First the vision tower alone learns layout, colors and shapes of scenes; then the whole model learns to describe them
(`demo.two_phases`), each picture in several wordings, so that what it says varies. With all wordings the order of the
two things stays a coin; with those that name the thing on the left or at the top first (`in_order`) it is learned.
Scenes are those of `POOLS["teacher"]`; none of the data set's is ever drawn. The teacher sees new pictures all the
time, the student a number of pictures again and again.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

from demo import build, two_phases
from demo import train as packed
from demo.wordings import captions_of, describes
from masters.data.sources.captions import COLORS, QUESTION, RELATIONS, SHAPES, SIDE, Scene, picture_of, pools

HELD_OUT = 60  # scenes, the last of the pool in a fixed shuffled order, never trained on
TOKENS = 32  # at most, of an answer


@dataclass(frozen=True, kw_only=True)
class Recipe(two_phases.Recipe):
    """`pictures` bounds how many a model sees, None: every one is new. `in_order` is explained at `wordings`."""

    pictures: int | None = None
    in_order: bool = False


SIZES = {"teacher": "middle", "student": "student"}  # of demo.build
RECIPES = {
    "teacher": Recipe(eye_steps=250, steps=500),
    "student": Recipe(eye_steps=250, steps=400, pictures=800, in_order=True),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer learned from the question and all captions: each word is one token."""
    scenes = [scene for pool in pools().values() for scene in pool]
    return build.tokenizer([QUESTION, *(caption for scene in scenes for caption in captions_of(scene))])


def shuffled_pool() -> list[Scene]:
    """Return the scenes that models are trained on, in a fixed order that mixes layouts, colors and shapes."""
    pool = pools()["teacher"]
    return [pool[at] for at in np.random.default_rng(0).permutation(len(pool))]


def attributes(scene: Scene) -> list[int]:
    """Return layout, and color and shape of both things, as numbers."""
    things = (scene.first, scene.second)
    named = [(list(COLORS).index(thing.color), SHAPES.index(thing.shape)) for thing in things]
    return [list(RELATIONS).index(scene.layout), *named[0], *named[1]]


def wordings(scene: Scene, in_order: bool) -> list[str]:
    """Return captions of a scene; `in_order`: only those that name the first thing first."""
    first, second = str(scene.first), str(scene.second)
    return [text for text in captions_of(scene) if not in_order or text.index(first) < text.index(second)]


class Scenes:
    """Draws scenes of a pool; with `pictures` only so many, each again and again."""

    size: ClassVar[tuple[int, int]] = (SIDE, SIDE)
    attributes: ClassVar[int] = 5
    choices: ClassVar[int] = max(len(COLORS), len(SHAPES))

    def __init__(self, pool: list[Scene], pictures: int | None, seed: int) -> None:
        self.pool, self.rng = pool, np.random.default_rng(seed)
        self.kept = None if pictures is None else [self._new() for _ in range(pictures)]

    def take(self, count: int) -> list[tuple[Image.Image, Scene]]:
        if self.kept is None:
            return [self._new() for _ in range(count)]
        return [self.kept[int(at)] for at in self.rng.integers(len(self.kept), size=count)]

    def draw(self, count: int) -> tuple[list[Image.Image], torch.Tensor]:
        taken = self.take(count)
        return [picture for picture, _ in taken], torch.tensor([attributes(scene) for _, scene in taken])

    def _new(self) -> tuple[Image.Image, Scene]:
        scene = self.pool[int(self.rng.integers(len(self.pool)))]
        return picture_of(self.rng, scene), scene


class Task(two_phases.Task):
    """Every picture in several wordings."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        pool = shuffled_pool()
        self.recipe = recipe
        self.scenes = Scenes(pool[:-HELD_OUT], recipe.pictures, seed)
        self.held = Scenes(pool[-HELD_OUT:], None, seed + 1)

    def rows(self, packer: packed.Packer, rng: np.random.Generator) -> list[tuple[Image.Image, list[tuple]]]:
        taken = self.scenes.take(self.recipe.batch)
        return [
            (picture, [(QUESTION, text) for text in wordings(scene, self.recipe.in_order)]) for picture, scene in taken
        ]

    def score(self, model: Qwen3VLForConditionalGeneration, packer: packed.Packer) -> float:
        """Return the share of 320 greedy answers that describe the scene."""
        right = []
        for _ in range(5):
            taken = self.held.take(64)
            told = greedy(model, packer, [picture for picture, _ in taken])
            right += [describes(text, scene.caption) for text, (_, scene) in zip(told, taken, strict=True)]
        return sum(right) / len(right)


@torch.no_grad()
def greedy(model: Qwen3VLForConditionalGeneration, packer: packed.Packer, pictures: list[Image.Image]) -> list[str]:
    """Return the model's greedy answer about each picture."""
    prompt = packer.prefix + packer.segment(QUESTION, "")[0]
    ids = torch.tensor([prompt]).expand(len(pictures), -1)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=packed.patches(pictures),
        image_grid_thw=packed.grid(len(pictures), Scenes.size), max_new_tokens=TOKENS, do_sample=False,
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
    )  # fmt: skip
    return packer.text.batch_decode(out[:, len(prompt) :], skip_special_tokens=True)


def main() -> None:
    arguments = two_phases.parser(__doc__, RECIPES)
    arguments.add_argument("--in-order", action="store_true", default=None, help="learn to name the first thing first")
    given = two_phases.parsed(arguments)
    recipe = two_phases.chosen(RECIPES[given.which], given, "in_order")
    two_phases.train(
        given, SIZES[given.which], given.out / f"captions-{given.which}", recipe, tokenizer(), Task, packed.Packer
    )


if __name__ == "__main__":
    main()
