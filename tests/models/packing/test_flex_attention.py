"""FlexAttention, which GPUs use, as far as a CPU runs it (without gradients)."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from demo import families
from masters.models.families import family_of
from masters.models.model_loading import attention_implementation
from masters.models.packing import packed_batch
from tests.models import tiny_models

FOLDER = Path(__file__).parents[3] / "demo" / "models" / "student"
ROW = 256  # tokens, two blocks


@torch.no_grad()
@pytest.mark.parametrize("name", families.NAMES)
def test_skipping_empty_blocks_changes_nothing(name: str) -> None:
    model = tiny_models.model(name, seed=0)
    questions = [
        tiny_models.question(model, n, 3 + n, tiny_models.random_responses(n, [3, 1, 5 + 20 * n]), image_of=min(n, 2))
        for n in range(4)
    ]
    found = []
    for device in ("cpu", "cuda"):
        model.set_attn_implementation(attention_implementation(device))
        packed = packed_batch.pack(questions, model, family_of(model.config.model_type), ROW)
        found.append(packed_batch.response_logits(model, packed))
    assert packed.inputs["input_ids"].shape == (1, ROW)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_models_load_with_the_gpu_attention() -> None:
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, attn_implementation=attention_implementation("cuda"))
    assert packed_batch._skips_empty_blocks(model)
    assert model.model.visual.config._attn_implementation == "sdpa"
