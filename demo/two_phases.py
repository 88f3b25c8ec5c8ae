"""Train the teacher and the student of a drawn task from scratch; `demo.digits` and `demo.captions` provide the data.

Two phases. First the vision tower alone learns to read the pictures' attributes; then the whole model learns to
answer, several questions of a picture packed behind one copy of it. Both draw their pictures as they go.
"""

import argparse
import copy
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

from demo import build
from demo import train as packed


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a model's training. Step counts are optimizer steps."""

    eye_steps: int
    steps: int
    batch: int = 32
    eye_batch: int = 64
    learning_rate: float = 1.5e-3


R = TypeVar("R", bound=Recipe)


class Scenes(Protocol):
    """Pictures of one size whose `attributes` have up to `choices` values each."""

    size: ClassVar[tuple[int, int]]
    attributes: ClassVar[int]
    choices: ClassVar[int]

    def draw(self, count: int) -> tuple[list[Image.Image], torch.Tensor]:
        """Draw pictures. Returns them and their attributes [count, attributes]."""
        ...


class Task(ABC):
    """Training data and held-out score of one training, made from a recipe and a seed."""

    scenes: Scenes
    held: Scenes  # never trained on: the progress is measured on them

    @abstractmethod
    def rows(self, packer: packed.Packer, rng: np.random.Generator) -> list[tuple[Image.Image, list[tuple]]]:
        """Draw a batch: pictures, each with its questions as `packed.Packer` takes them."""

    @abstractmethod
    def score(self, model: Qwen3VLForConditionalGeneration, packer: packed.Packer) -> float:
        """Return the share of right answers on held-out scenes."""


def train_eye(model: Qwen3VLForConditionalGeneration, scenes: Scenes, held: Scenes, recipe: Recipe) -> None:
    """Train the vision tower (phase one) to predict each attribute at its own place."""
    eye = model.model.visual
    tokens = scenes.size[0] * scenes.size[1] // (4 * build.PATCH**2)
    head = torch.nn.Linear(tokens * model.config.text_config.hidden_size, scenes.attributes * scenes.choices)
    optimizer = torch.optim.AdamW([*eye.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.05)
    planner, began = packed.schedule(optimizer, recipe.eye_steps), time.time()
    for step in range(1, recipe.eye_steps + 1):
        loss, _ = _read(eye, head, scenes, recipe.eye_batch)
        packed.update(eye, optimizer, planner, loss)
        if step % 100 == 0:
            with torch.no_grad():
                _, right = _read(eye, head, held, 300)
            print(f"eye {step} loss {loss.item():.4f} held out {right:.4f} {time.time() - began:.0f} s", flush=True)


def _read(eye, head: torch.nn.Linear, scenes: Scenes, count: int) -> tuple[torch.Tensor, float]:
    """Return the cross-entropy of the attributes of drawn scenes, and the share that is predicted correctly."""
    pictures, values = scenes.draw(count)
    out = eye(packed.patches(pictures), grid_thw=packed.grid(count, scenes.size)).pooler_output
    out = out if isinstance(out, torch.Tensor) else torch.cat(list(out))
    logits = head(out.view(count, -1)).view(-1, scenes.choices)
    loss = F.cross_entropy(logits, values.reshape(-1))
    return loss, (logits.argmax(1) == values.reshape(-1)).float().mean().item()


def train_answers(
    model: Qwen3VLForConditionalGeneration, packer: packed.Packer, task: Task, recipe: Recipe, seed: int
) -> list[dict]:
    """Train all parameters to answer (phase two). Returns the progress on held-out scenes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    planner, rng, began = packed.schedule(optimizer, recipe.steps), np.random.default_rng(seed), time.time()
    progress = []
    for step in range(1, recipe.steps + 1):
        loss, _ = packed.loss_of(model, *packer(task.rows(packer, rng)))
        packed.update(model, optimizer, planner, loss)
        if step % max(1, recipe.steps // 10) == 0:
            score = round(task.score(model, packer), 4)
            progress.append(dict(step=step, loss=round(loss.item(), 4), held_out_accuracy=score))
            print(progress[-1], f"{time.time() - began:.0f} s", flush=True)
    return progress


def parser(description: str | None, recipes: Mapping[str, Recipe]) -> argparse.ArgumentParser:
    """Return a parser of the arguments that every task's training takes."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("which", choices=recipes)
    found.add_argument("--out", type=Path, default=Path(__file__).parent / "models")
    found.add_argument("--more", type=int, help="continue phase two for this many steps")
    found.add_argument("--mean", action="store_true", help="keep the mean of the weights before and after --more")
    found.add_argument("--learning-rate", type=float, help="of phase two, at its highest")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--threads", type=int, default=1)
    return found


def parsed(arguments: argparse.ArgumentParser) -> argparse.Namespace:
    given = arguments.parse_args()
    if given.mean and not given.more:
        arguments.error("--mean needs --more: there are no weights before")
    return given


def chosen(recipe: R, given: argparse.Namespace, *more: str) -> R:
    """Return the recipe with what the arguments say: steps, learning rate and the fields named in `more`."""
    values = dict(steps=given.more) | {name: getattr(given, name) for name in ("learning_rate", *more)}
    return replace(recipe, **{name: value for name, value in values.items() if value is not None})


def seed_of(given: argparse.Namespace) -> int:
    """Return the seed of drawing: --more draws other scenes than the training that it continues."""
    return given.seed + (100 if given.more else 0)


def train(
    given: argparse.Namespace, size: str, folder: Path, recipe: R, text: PreTrainedTokenizerFast,
    task_of: Callable[[R, int], Task], packer_of: Callable[..., packed.Packer],
) -> None:  # fmt: skip
    """Train a model of a size and write it to a folder, its recipe and progress beside it."""
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    task, history = task_of(recipe, seed_of(given)), []
    if given.more:
        model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        history = json.loads((folder / "training.json").read_text())
    else:
        model = build.model(size, text)
        print(given.which, f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
        train_eye(model, task.scenes, task.held, recipe)
    before = copy.deepcopy(model.state_dict())
    progress = train_answers(model, packer_of(text, model, task.scenes.size), task, recipe, seed_of(given))
    if given.mean:
        model.load_state_dict({name: (value + before[name]) / 2 for name, value in model.state_dict().items()})
    build.save(model, text, folder)
    history.append(dict(seed=seed_of(given), mean=given.mean, recipe=vars(recipe), progress=progress))
    (folder / "training.json").write_text(json.dumps(history, indent=1))
