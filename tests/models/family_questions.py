"""Questions about drawn images for a model folder, and the folder's model with masked weights."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoProcessor

from demo import shapes
from masters.models.model_loading import load_model, remask
from masters.models.packing.prefix_tree import Question


def questions(
    folder: Path, sides: list[tuple[int, int]], lengths: list[list[int]], tokens: tuple[int, int]
) -> list[Question]:
    """Make one question per image size, with responses of these lengths made of random tokens."""
    processor, rng, made = AutoProcessor.from_pretrained(folder), np.random.default_rng(3), []
    for number, (side, response_lengths) in enumerate(zip(sides, lengths, strict=True)):
        image = shapes.draw(rng)[0].resize(side)
        words = f"what shape is it{' now' * number}?"
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}
        text = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        prompt = dict(processor(text=[text], images=[image], return_tensors="pt"))
        made.append(Question(f"q{number}", prompt, [rng.integers(*tokens, n).tolist() for n in response_lengths]))
    return made


def load_masked(folder: Path, thresholds: dict[str, float], dtype: str) -> torch.nn.Module:
    """Load the model with every tensor of `thresholds` masked below its threshold (Eq. 1-2)."""
    model = load_model(folder, dtype)
    remask(model, folder, thresholds)
    return model
