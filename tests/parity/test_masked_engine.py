"""A masked teacher in vLLM answers as it does in transformers: one engine, several masks one after the other."""

import io
from pathlib import Path

import numpy as np
import pytest

from demo import families, shapes
from masters.models.masking import group_thresholds, iterate_tensors
from tests.parity.answers import from_transformers, from_vllm

RATIOS = [0.2, 0.4, 0.0]
SIDES = [(64, 64), (120, 60), (56, 180), (200, 200)]  # windows, grids and tiles of several kinds
PADDING = 64  # rows of the embedding matrix beyond the tokenizer's entries
CASES = [(name, tied, padding) for name in families.NAMES for tied, padding in ((False, PADDING), (True, 0))]
DEFAULT = ("qwen2_5_vl", False, PADDING)


def questions() -> list[tuple[bytes, str]]:
    rng, made = np.random.default_rng(5), []
    for number, side in enumerate(SIDES):
        image, _, _ = shapes.draw(rng)
        buffer = io.BytesIO()
        image.resize(side).save(buffer, "PNG")
        made.append((buffer.getvalue(), f"what shape is it{' now' * number}?"))
    return made


def thresholds(folder: Path) -> list[dict[str, float]]:
    rows = group_thresholds(lambda: iterate_tensors(folder), RATIOS, "matrix")
    return [{r["tensor"]: r["threshold"] for r in rows if r["mask_ratio"] == ratio and ratio > 0} for ratio in RATIOS]


@pytest.mark.parametrize(
    ("name", "tied", "padding"), [pytest.param(*c, marks=[] if c == DEFAULT else pytest.mark.slow) for c in CASES]
)
def test_greedy_tokens_are_the_same(name: str, tied: bool, padding: int, tmp_path: Path) -> None:
    folder = families.save(name, tmp_path / "teacher", ["what shape is it now?"], "teacher", tied, padding)
    masks, asked = thresholds(folder), questions()
    expected = from_transformers(folder, masks, asked)
    found = from_vllm(folder, masks, asked)
    assert found == expected
    answers = [[tuple(a.response) for a in at] for at in expected]
    assert len({tuple(at) for at in answers}) == len(RATIOS)  # masks change what is said
    assert all(len(set(at)) > 1 for at in answers)  # and so do images and questions
