"""The parity check accepts correct code and detects wrong attention and wrong weights."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoProcessor

from demo import shapes
from masters.checks import parity_worker
from masters.models import model_loading, prompts
from masters.models.families import family_of
from masters.models.losses import formulas
from masters.models.masking import group_thresholds, iterate_tensors
from masters.models.packing import packed_batch
from masters.models.packing.packed_batch import pack, response_logits
from masters.models.packing.prefix_tree import Question
from tests.models.family_questions import load_masked

FOLDER = Path(__file__).parents[2] / "demo/models/teacher"
FAMILY = family_of(AutoConfig.from_pretrained(FOLDER).model_type)


@pytest.fixture(scope="module")
def prompt() -> dict[str, torch.Tensor]:
    png = io.BytesIO()
    shapes.draw(np.random.default_rng(0))[0].save(png, "PNG")
    return prompts.model_inputs(AutoProcessor.from_pretrained(FOLDER), "what color is the shape?", png.getvalue())


@pytest.fixture
def model() -> torch.nn.Module:
    return model_loading.load_model(FOLDER, "float32")


def test_correct_packing_agrees_with_separate_sequences(model, prompt) -> None:
    question = Question("q", prompt, [[40, 41, 2], [50, 2], [60, 61, 62, 2]])
    for difference in parity_worker.compare_packing("teacher", model, FAMILY, question):
        assert difference.is_rounding, difference


def test_responses_that_attend_to_each_other_are_detected(model, prompt, monkeypatch) -> None:
    def causal(branch_3BL: torch.Tensor) -> torch.Tensor:
        _, rows, length = branch_3BL.shape
        return torch.ones(rows, 1, length, length, dtype=torch.bool).tril()

    monkeypatch.setattr(packed_batch, "attention_mask", causal)
    question = Question("q", prompt, [[40, 41, 2], [50, 2], [60, 61, 62, 2]])
    for difference in parity_worker.compare_packing("teacher", model, FAMILY, question):
        assert not difference.is_rounding, difference


def test_an_engine_with_other_weights_is_detected(model, prompt) -> None:
    tokens = [40, 41, 2]
    packed = pack([Question("q", prompt, [tokens])], model, FAMILY)
    with torch.no_grad():
        log_probs = formulas.chosen_log_probs(response_logits(model, packed), packed.token_T).tolist()
    assert parity_worker.compare_log_probs(model, FAMILY, prompt, tokens, log_probs) == 0
    rows = group_thresholds(lambda: iterate_tensors(FOLDER), [0.2], "matrix")
    masked = load_masked(FOLDER, {r["tensor"]: r["threshold"] for r in rows}, "float32")
    assert (
        parity_worker.compare_log_probs(masked, FAMILY, prompt, tokens, log_probs)
        > parity_worker.LOG_PROB_LIMITS["float32"]
    )
