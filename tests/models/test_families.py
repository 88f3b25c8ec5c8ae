"""Checkpoints of every family are masked, with older and newer tensor names in their files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from demo import families
from masters.models.masking import apply_mask, group_thresholds, iterate_tensors, magnitude_thresholds
from masters.models.model_loading import load_model, remask
from tests.models.family_questions import load_masked

RATIO = 0.3
CASES = [(name, tied) for name in families.NAMES for tied in (True, False)]


@pytest.fixture(scope="module", params=CASES, ids=str)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, tied = request.param
    return families.save(name, tmp_path_factory.mktemp(name), ["what shape is it now?"], "teacher", tied)


@pytest.mark.parametrize("newer_names", [False, True])
def test_a_checkpoint_is_masked_with_older_and_newer_tensor_names(
    folder: Path, newer_names: bool, tmp_path: Path
) -> None:
    """Qwen2.5-VL's and InternVL's files keep names from before transformers nested their models."""
    plain = load_model(folder, "bfloat16")
    if newer_names:
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        save_file(dict(plain.named_parameters()), tmp_path / "model.safetensors", {"format": "pt"})
        folder = tmp_path
    rows = group_thresholds(lambda: iterate_tensors(folder), [RATIO], "matrix")
    masked = load_masked(folder, {r["tensor"]: r["threshold"] for r in rows}, "bfloat16")
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
    hidden = {f"{n}.weight" for n, m in plain.named_modules() if isinstance(m, kinds) and n != "lm_head"}
    for (name, before), after in zip(plain.named_parameters(), masked.parameters(), strict=True):
        threshold = magnitude_thresholds(before, [RATIO])[0] if name in hidden else 0.0
        assert torch.equal(after, apply_mask(before, threshold)), name
    storage = [parameter.data_ptr() for parameter in masked.parameters()]
    remask(masked, folder, {r["tensor"]: 0.0 for r in rows})  # unmasked again, in the same storage
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), masked.parameters(), strict=True))
    assert storage == [parameter.data_ptr() for parameter in masked.parameters()]
