"""Train the demo's teacher and student from scratch: `make demo-models`.

Two phases. First the eye alone learns to tell drawn shapes and colors apart (an ordinary classifier over its
mean output); then the whole model learns to answer, all questions of an image packed behind one copy of it.
Only easy-VQA's training split is read, its last images kept aside to watch the progress.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import easy_vqa
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration

from demo import build, shapes

HELD_OUT = 400  # training images, the last ones, never trained on
IGNORE = -100
SQUARE = (shapes.SIDE, shapes.SIDE)  # pixels: height and width of easy-VQA's images


@dataclass(frozen=True)
class Recipe:
    """Settings of a model's training. Counts are optimizer steps; `images` bounds the labeled images it sees."""

    eye_steps: int
    steps: int
    images: int
    drawn_share: float
    batch: int = 32
    questions: int = 10
    learning_rate: float = 1.5e-3


RECIPES = {
    "teacher": Recipe(eye_steps=1800, steps=2200, images=4000 - HELD_OUT, drawn_share=0.7),
    "student": Recipe(eye_steps=800, steps=600, images=150, drawn_share=0.0),
}


def labeled() -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the training split as (image path, [(question, answer), ...]) per image."""
    paths = easy_vqa.get_train_image_paths()
    grouped: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in zip(*easy_vqa.get_train_questions(), strict=True):
        grouped.setdefault(image, []).append((question, answer))
    return [(paths[i], grouped[i]) for i in sorted(grouped)]


def patches(images: list[Image.Image]) -> torch.Tensor:
    """Return the pixel_values of images of one size, as the family's processor makes them: [patches, 3 * 2 * 8 * 8]."""
    p, m = build.PATCH, 2
    x = torch.from_numpy(np.stack([np.asarray(i.convert("RGB")) for i in images])).float() / 255 * 2 - 1
    _, height, width, _ = x.shape
    x = x.view(len(images), height // p // m, m, p, width // p // m, m, p, 3)
    x = x.permute(0, 1, 4, 2, 5, 7, 3, 6)  # b, row, col, m, m, C, p, p
    return x.unsqueeze(6).expand(*x.shape[:6], 2, p, p).reshape(len(images) * height * width // p**2, -1)


def grid(count: int, size: tuple[int, int] = SQUARE) -> torch.Tensor:
    """Return image_grid_thw of `count` images of a size (height, width) in pixels, [count, 3]."""
    height, width = size
    return torch.tensor([[1, height // build.PATCH, width // build.PATCH]]).expand(count, 3)


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a learning rate schedule: a warm-up over 100 steps, then a cosine to zero."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(1, s / steps)))
    )


def update(module: torch.nn.Module, optimizer, planner, loss: torch.Tensor) -> None:
    """Take one optimizer step, with gradients of `module` clipped to a norm of 1."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    planner.step()


def train_eye(model: Qwen3VLForConditionalGeneration, recipe: Recipe, rng: np.random.Generator) -> None:
    """Train the vision tower (phase one) to predict shape and color from its mean output, on drawn images alone."""
    eye, width = model.model.visual, model.config.text_config.hidden_size
    head = torch.nn.Linear(width, len(shapes.SHAPES) + len(shapes.COLORS))
    optimizer = torch.optim.AdamW([*eye.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.01)
    planner, colors, right, began = schedule(optimizer, recipe.eye_steps), list(shapes.COLORS), 0.0, time.time()
    for step in range(recipe.eye_steps):
        drawn = [shapes.draw(rng) for _ in range(64)]
        out = eye(patches([d[0] for d in drawn]), grid_thw=grid(64)).pooler_output
        out = out if isinstance(out, torch.Tensor) else torch.cat(list(out))
        logits = head(out.view(64, -1, width).mean(1))
        shape = torch.tensor([shapes.SHAPES.index(d[1]) for d in drawn])
        color = torch.tensor([colors.index(d[2]) for d in drawn])
        loss = F.cross_entropy(logits[:, :3], shape) + F.cross_entropy(logits[:, 3:], color)
        update(eye, optimizer, planner, loss)
        right = 0.98 * right + 0.02 * (logits[:, :3].argmax(1) == shape).float().mean().item()
        if step % 250 == 249:
            print(
                f"eye {step + 1}/{recipe.eye_steps} loss {loss.item():.4f} shapes {right:.3f}",
                f"{time.time() - began:.0f} s",
                flush=True,
            )


def stacked(packed: list[tuple[list[int], ...]], padding: int) -> tuple[torch.Tensor, ...]:
    """Stack rows of (ids, labels, segments, offsets). Returns ids, labels, attention mask [B, 1, L, L] and offsets.

    A token sees the shared prefix (segment 0) and the earlier tokens of its own segment. Ids, labels and offsets are
    [B, L].
    """
    length = max(len(row[0]) for row in packed)
    ids, labels, segments, offsets = (
        torch.stack([F.pad(torch.tensor(row[k]), (0, length - len(row[k])), value=fill) for row in packed])
        for k, fill in ((0, padding), (1, IGNORE), (2, -1), (3, 0))
    )
    i = torch.arange(length)
    same = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    return ids, labels, ((i[:, None] >= i[None, :]) & same)[:, None], offsets


class Packer:
    """Packs an image and its questions into one row: a shared prefix, then a segment a question.

    A question comes with its answer and, where not all of the answer's tokens are to be learned, with their labels.
    """

    def __init__(self, text, model: Qwen3VLForConditionalGeneration, size: tuple[int, int] = SQUARE) -> None:
        self.text, self.model, self.size = text, model, size
        tokens = size[0] * size[1] // (4 * build.PATCH**2)
        whole = build.CHAT_TEMPLATE and text.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\0"}]}],
            tokenize=False, add_generation_prompt=True,
        )  # fmt: skip
        before, self.after = whole.split("\0")
        self.prefix = text(before.replace("<|image_pad|>", "<|image_pad|>" * tokens))["input_ids"]
        self.cache: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def segment(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Return the token ids of (question and turn markers, answer and end token)."""
        key = (question, answer)
        if key not in self.cache:
            self.cache[key] = (
                self.text(question + self.after)["input_ids"],
                self.text(answer)["input_ids"] + [self.text.eos_token_id],
            )
        return self.cache[key]

    def __call__(self, rows: list[tuple[Image.Image, list[tuple]]]) -> tuple[dict, torch.Tensor]:
        """Return model inputs and labels [B, L] of rows of (image, questions with answers)."""
        packed = [self._row(questions) for _, questions in rows]
        ids, labels, mask, offsets = stacked(packed, self.text.pad_token_id)
        kind, head = (ids == self.model.config.image_token_id).int(), len(self.prefix)
        start, _ = self.model.model.get_rope_index(
            ids[:1, :head], mm_token_type_ids=kind[:1, :head], image_grid_thw=grid(1, self.size)
        )
        after = (start.max() + 1 + offsets[:, len(self.prefix) :]).expand(3, -1, -1)
        position = torch.cat([start.expand(3, len(rows), -1), after], 2)
        inputs = dict(
            input_ids=ids, attention_mask=mask, position_ids=position, mm_token_type_ids=kind,
            pixel_values=patches([r[0] for r in rows]), image_grid_thw=grid(len(rows), self.size), use_cache=False,
        )  # fmt: skip
        return inputs, labels

    def _row(self, questions: list[tuple]) -> tuple[list[int], ...]:
        ids, labels = list(self.prefix), [IGNORE] * len(self.prefix)
        segments, offsets = [0] * len(ids), [0] * len(ids)
        for number, (question, answer, *taught) in enumerate(questions, 1):
            asked, answered = self.segment(question, answer)
            ids += asked + answered
            labels += [IGNORE] * len(asked) + (taught[0] if taught else answered)
            segments += [number] * (len(asked) + len(answered))
            offsets += range(len(asked) + len(answered))
        return ids, labels, segments, offsets


def batches(recipe: Recipe, rows: list, rng: np.random.Generator) -> Iterator[list]:
    """Yield batches without end: real images, mirrored at random, and drawn ones with questions of the same forms."""
    forms = sorted({q for _, questions in rows for q, _ in questions})
    images = [Image.open(path).convert("RGB") for path, _ in rows]
    while True:
        batch = []
        for _ in range(recipe.batch):
            if rng.random() < recipe.drawn_share:
                image, shape, color = shapes.draw(rng)
                fitting = [(q, a) for q in forms if (a := shapes.answer_for(q, shape, color))]
            else:
                at = int(rng.integers(len(rows)))
                image, fitting = images[at], rows[at][1]
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image
            chosen = rng.permutation(len(fitting))[: recipe.questions]
            batch.append((image, [fitting[k] for k in chosen]))
        yield batch


def loss_of(
    model: Qwen3VLForConditionalGeneration, inputs: dict, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cross-entropy (mean over answer tokens) and, per answer token, whether the greedy choice is right."""
    return answer_loss(model, model.model(**inputs).last_hidden_state, labels)


def answer_loss(
    model: Qwen3VLForConditionalGeneration, hidden_BLH: torch.Tensor, labels_BL: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    wanted = labels_BL[:, 1:]
    at = wanted != IGNORE
    logits = model.lm_head(hidden_BLH[:, :-1][at])
    return F.cross_entropy(logits, wanted[at]), logits.argmax(-1) == wanted[at]


@torch.no_grad()
def exact_match(model: Qwen3VLForConditionalGeneration, packer: Packer, rows: list) -> float:
    """Return the share of questions that greedy decoding answers correctly: every answer token is the greedy choice."""
    right, total = 0, 0
    for at in range(0, len(rows), 32):
        inputs, labels = packer([(Image.open(path), questions) for path, questions in rows[at : at + 32]])
        _, hits = loss_of(model, inputs, labels)
        lengths = [len(packer.segment(*pair)[1]) for _, questions in rows[at : at + 32] for pair in questions]
        right += sum(bool(part.all()) for part in hits.split(lengths))
        total += len(lengths)
    return right / total


def train_answers(model, packer: Packer, recipe: Recipe, rng: np.random.Generator) -> list[dict]:
    """Train all parameters to answer (phase two). Returns the progress on the held-out training images."""
    rows = labeled()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    planner, stream, began, progress = (
        schedule(optimizer, recipe.steps),
        batches(recipe, rows[: recipe.images], rng),
        time.time(),
        [],
    )
    for step in range(1, recipe.steps + 1):
        loss, _ = loss_of(model, *packer(next(stream)))
        update(model, optimizer, planner, loss)
        if step % max(1, recipe.steps // 10) == 0:
            score = exact_match(model, packer, rows[-HELD_OUT:])
            progress.append(dict(step=step, loss=round(loss.item(), 4), held_out_exact_match=round(score, 4)))
            print(progress[-1], f"{time.time() - began:.0f} s", flush=True)
    return progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=RECIPES)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    rng, recipe = np.random.default_rng(given.seed), RECIPES[given.which]
    text = build.tokenizer([t for _, questions in labeled() for pair in questions for t in pair])
    model = build.model(given.which, text)
    print(given.which, f"{sum(p.numel() for p in model.parameters()):,} parameters", recipe, flush=True)
    train_eye(model, recipe, rng)
    progress = train_answers(model, Packer(text, model), recipe, rng)
    folder = given.out / given.which
    build.save(model, text, folder)
    (folder / "training.json").write_text(
        json.dumps(dict(seed=given.seed, recipe=vars(recipe), progress=progress), indent=1)
    )


if __name__ == "__main__":
    main()
