"""Train the digit task's teacher, middle model and student from scratch: `make demo-models` gives the commands.

Two phases. First the vision tower alone learns to read three handwritten digits; then the whole model learns to answer
in steps, all questions of a scene packed behind one copy of it. In a share of the answers one digit is changed and
everything after it follows from the changed one, so that the models compute from what they wrote, as large models do.
Training draws its own scenes from the digits of `POOLS["teacher"]`; the data set's digits are never read.
"""

import argparse
import copy
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

from demo import build
from demo import train as packed
from masters.data.sources.digits import DIGITS, HEIGHT, POOLS, SLOT, WIDTH, Handwriting, load_handwriting, questions

SIZE = (HEIGHT, WIDTH)
HELD_OUT = 200  # digits, the last of the pool, never trained on: the progress is measured on them


@dataclass(frozen=True)
class Recipe:
    """How far a model is trained. Counts of steps are of the optimizer; `digits` bounds the handwriting it sees."""

    digits: int
    eye_steps: int
    steps: int
    distortion: float = 0.0  # of the digits' shapes
    batch: int = 32
    eye_batch: int = 64
    changed: float = 0.35  # share of answers with a changed digit
    learning_rate: float = 1.5e-3


RECIPES = {
    "teacher": Recipe(digits=len(POOLS["teacher"]) - HELD_OUT, eye_steps=1500, steps=700, distortion=1.0),
    "middle": Recipe(digits=450, eye_steps=900, steps=700, distortion=0.5),
    "student": Recipe(digits=150, eye_steps=800, steps=800),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Learned from every question that can be asked, with its answers: each digit is one token."""
    every = [question for scene in np.ndindex(10, 10, 10) for question in questions(list(scene))]
    return build.tokenizer([text for q in every for text in (q.text, q.answer, q.steps)])


class Scenes:
    """Draws scenes of a pool of digits, as many at a time as asked for, shapes distorted at random."""

    def __init__(self, written: Handwriting, pool: range, distortion: float, seed: int) -> None:
        self.ink = torch.from_numpy(written.images[list(pool)]).float() / 255
        self.labels = torch.from_numpy(written.labels[list(pool)])
        self.distortion, self.source = distortion, torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> tuple[list[Image.Image], torch.Tensor]:
        """Pictures, and their digits [count, 3]."""
        chosen = torch.randint(len(self.ink), (count * DIGITS,), generator=self.source)
        slots = F.grid_sample(self.ink[chosen][:, None], self._places(len(chosen)), align_corners=False)
        row = torch.cat(list(slots.view(count, DIGITS, HEIGHT, SLOT).unbind(1)), -1)
        white = (255 * (1 - F.pad(row, (0, WIDTH - DIGITS * SLOT)))).round().byte().numpy()
        return [Image.fromarray(picture).convert("RGB") for picture in white], self.labels[chosen].view(count, DIGITS)

    def _places(self, count: int) -> torch.Tensor:
        """Where each pixel of a slot lies in its digit, [count, HEIGHT, SLOT, 2] in [-1, 1]."""
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


def train_eye(model: Qwen3VLForConditionalGeneration, scenes: Scenes, held: Scenes, recipe: Recipe) -> None:
    """Phase one: the three digits from the vision tower's outputs."""
    eye, tokens = model.model.visual, HEIGHT * WIDTH // (4 * build.PATCH**2)
    head = torch.nn.Linear(tokens * model.config.text_config.hidden_size, DIGITS * 10)
    optimizer = torch.optim.AdamW([*eye.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.05)
    planner, began = packed.schedule(optimizer, recipe.eye_steps), time.time()
    for step in range(1, recipe.eye_steps + 1):
        loss, _ = _read(eye, head, *scenes.draw(recipe.eye_batch))
        packed.update(eye, optimizer, planner, loss)
        if step % 100 == 0:
            with torch.no_grad():
                _, right = _read(eye, head, *held.draw(300))
            print(f"eye {step} loss {loss.item():.4f} held out {right:.4f} {time.time() - began:.0f} s", flush=True)


def _read(eye, head: torch.nn.Linear, pictures: list[Image.Image], digits: torch.Tensor) -> tuple[torch.Tensor, float]:
    out = eye(packed.patches(pictures), grid_thw=packed.grid(len(pictures), SIZE)).pooler_output
    out = out if isinstance(out, torch.Tensor) else torch.cat(list(out))
    logits = head(out.view(len(pictures), -1)).view(-1, 10)
    loss = F.cross_entropy(logits, digits.reshape(-1))
    return loss, (logits.argmax(1) == digits.reshape(-1)).float().mean().item()


class Packer(packed.Packer):
    """Packs scenes whose questions are (question, answer in steps, answer with a changed digit)."""

    def taught(self, right: str, written: str) -> list[int]:
        """Labels of `written`: its tokens up to the changed digit, that one among them, are not learned."""
        answer, labels = self.segment("", right)[1], list(self.segment("", written)[1])
        if right != written:
            changed = next(at for at, (x, y) in enumerate(zip(answer, labels, strict=False)) if x != y)
            labels[: changed + 1] = [packed.IGNORE] * (changed + 1)
        return labels


def changed_digit(rng: np.random.Generator, digits: list[int], kind: int, share: float) -> str:
    """The answer in steps to question `kind`, in a share of cases with one digit of the scene replaced."""
    replaced = list(digits)
    if rng.random() < share:
        replaced[rng.integers(DIGITS)] = int(rng.integers(10))
    return questions(replaced)[kind].steps


def train_answers(model, packer: Packer, scenes: Scenes, held: Scenes, recipe: Recipe, seed: int) -> list[dict]:
    """Phase two: every parameter learns to answer. Returns the progress on scenes of held-out digits."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    planner, rng, began = packed.schedule(optimizer, recipe.steps), np.random.default_rng(seed), time.time()
    progress = []
    for step in range(1, recipe.steps + 1):
        rows = []
        for picture, digits in zip(*scenes.draw(recipe.batch), strict=True):
            every = questions(digits.tolist())
            written = [changed_digit(rng, digits.tolist(), kind, recipe.changed) for kind in range(len(every))]
            asked = zip(every, written, strict=True)
            rows.append((picture, [(q.text, text, packer.taught(q.steps, text)) for q, text in asked]))
        loss, _ = packed.loss_of(model, *packer(rows))
        packed.update(model, optimizer, planner, loss)
        if step % max(1, recipe.steps // 10) == 0:
            score = exact(model, packer, held)
            progress.append(dict(step=step, loss=round(loss.item(), 4), held_out_exact_match=score))
            print(progress[-1], f"{time.time() - began:.0f} s", flush=True)
    return progress


@torch.no_grad()
def exact(model, packer: Packer, held: Scenes, scenes: int = 320) -> float:
    """Share of answers in steps whose every token is the greedy choice."""
    right: list[bool] = []
    for _ in range(0, scenes, 32):
        rows = [
            (picture, [(q.text, q.steps) for q in questions(digits.tolist())])
            for picture, digits in zip(*held.draw(32), strict=True)
        ]
        _, hits = packed.loss_of(model, *packer(rows))
        lengths = [len(packer.segment(*pair)[1]) for _, asked in rows for pair in asked]
        right += [bool(part.all()) for part in hits.split(lengths)]
    return round(sum(right) / len(right), 4)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=RECIPES)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "models")
    parser.add_argument("--more", type=int, help="go on with phase two for so many steps")
    parser.add_argument("--mean", action="store_true", help="keep the mean of the weights before and after --more")
    parser.add_argument("--learning-rate", type=float, help="of phase two, at its highest")
    parser.add_argument("--distortion", type=float, help="of the digits' shapes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    if given.mean and not given.more:
        parser.error("--mean needs --more: there are no weights before")
    return given


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    chosen = dict(steps=given.more, learning_rate=given.learning_rate, distortion=given.distortion)
    recipe = replace(RECIPES[given.which], **{name: value for name, value in chosen.items() if value is not None})
    folder = given.out / f"digits-{given.which}"
    written, pool, seed = load_handwriting(), POOLS["teacher"], given.seed + (100 if given.more else 0)
    held = Scenes(written, pool[-HELD_OUT:], 0.0, seed + 1)
    text, history = tokenizer(), []
    if given.more:
        model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        history = json.loads((folder / "training.json").read_text())
    scenes = Scenes(written, pool[: recipe.digits], recipe.distortion, seed)
    if not given.more:
        model = build.model(given.which, text)
        print(given.which, f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
        train_eye(model, scenes, held, recipe)
    before = copy.deepcopy(model.state_dict())
    progress = train_answers(model, Packer(text, model, SIZE), scenes, held, recipe, seed)
    if given.mean:
        model.load_state_dict({name: (value + before[name]) / 2 for name, value in model.state_dict().items()})
    build.save(model, text, folder)
    history.append(dict(seed=seed, mean=given.mean, recipe=vars(recipe), progress=progress))
    (folder / "training.json").write_text(json.dumps(history, indent=1))


if __name__ == "__main__":
    main()
