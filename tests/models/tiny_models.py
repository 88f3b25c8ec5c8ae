"""Tiny random models of `demo.families` and questions for them, with random token ids instead of a tokenizer."""

import numpy as np
import torch

from demo import families
from masters.models.masking import apply_mask, is_masked, magnitude_thresholds
from masters.models.packing.prefix_tree import Question

IMAGE_TOKENS = 4
WORDS = (20, 120)  # range of token ids without special tokens


def model(name: str, seed: int, ratio: float = 0.0, tied: bool = True) -> torch.nn.Module:
    """Make a random model of a family, masked at a ratio. `tied`: the head shares the embeddings' weight."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _, random_model = families.build(name, tied)
    for path, parameter in random_model.named_parameters() if ratio else ():
        if is_masked(path, parameter.ndim):
            parameter.data = apply_mask(parameter.data, *magnitude_thresholds(parameter.data, [ratio]))
    return random_model


def question(
    model: torch.nn.Module, number: int, words: int, responses: list[list[int]], image_of: int | None = None
) -> Question:
    """Make a question with `words` random words. `image_of`: the number whose image it has, by default its own."""
    rng, image = np.random.default_rng(number), torch.Generator().manual_seed(number if image_of is None else image_of)
    ids = [1, *[model.config.image_token_id] * IMAGE_TOKENS, *rng.integers(*WORDS, words).tolist()]
    prompt = {"input_ids": torch.tensor([ids])}
    if model.config.model_type.startswith("qwen"):
        prompt["pixel_values"] = torch.randn(4 * IMAGE_TOKENS, 3 * 2 * 14 * 14, generator=image)
        prompt["image_grid_thw"] = torch.tensor([[1, 4, 4]])
    else:
        prompt["pixel_values"] = torch.randn(1, 3, 56, 56, generator=image)
    return Question(f"q{number}", prompt, responses)


def random_responses(seed: int, lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(*WORDS, n).tolist() for n in lengths]
