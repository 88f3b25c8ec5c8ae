"""A pruned model: the smallest weights of each masked matrix are zero, everything else is as it was."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

from demo import prune
from masters.models.masking import is_masked

STUDENT = Path(__file__).parents[2] / "demo/models/digits-student"


def test_the_smallest_weights_of_each_masked_matrix_become_zero(tmp_path: Path) -> None:
    prune.prune(STUDENT, tmp_path, 0.585)
    before, after = load_file(STUDENT / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if not is_masked(name, weight.ndim):
            assert torch.equal(after[name], weight), name
            continue
        zero = after[name] == 0
        assert torch.equal(after[name][~zero], weight[~zero]), name
        assert zero.float().mean().item() == pytest.approx(0.585, abs=0.02), name  # ties of 16-bit weights are kept
        assert weight[zero].abs().max() <= weight[~zero].abs().min(), name
    assert AutoProcessor.from_pretrained(tmp_path).tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([str(STUDENT), "--ratio", "1.5"], "expected a share from 0 to 1, found 1.5"),
        (["nowhere", "--ratio", "0.5"], "found none at nowhere"),
    ],
)
def test_wrong_arguments_are_one_clear_line(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    folder, *options = arguments
    monkeypatch.setattr(sys, "argv", ["prune", folder, str(tmp_path / "out"), *options])
    with pytest.raises(SystemExit, match="2"):
        prune.main()
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
