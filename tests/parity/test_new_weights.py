"""An engine that takes the weights of a trained student answers as one that was started on them, bit for bit."""

from pathlib import Path

import pytest
import torch

from demo import families
from masters.config import Generate, Runtime
from masters.models.generation.engine import Engine, Reply, Request
from masters.models.model_loading import export_student, load_model
from tests.fork_server.call import call_in_process
from tests.parity.test_masked_engine import PADDING, questions

SAMPLED = Generate(max_tokens=24, dtype="float32").sampling
CASES = [(name, tied) for name in families.NAMES for tied in (False, True)]
DEFAULT = ("qwen3_vl", True)


def trained(folder: Path, out: Path) -> Path:
    """Return the model of a folder with every weight moved, as a trainer writes it."""
    model, generator = load_model(folder, "float32"), torch.Generator().manual_seed(7)
    moved = {
        name: p.detach() + 0.05 * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()
    }
    export_student(moved, folder, out)
    return out


def answers(folders: list[Path], again: bool) -> list[list[list[Reply]]]:
    """Three samples of each question by each folder's weights, all by one engine; `again`: which rests in between."""
    asked = [Request(image, question, 3, 100 * number) for number, (image, question) in enumerate(questions())]
    first, *others = folders
    with Engine(first, SAMPLED.dtype, Runtime(max_model_len=256), enable_sleep=again) as engine:
        found = [engine.generate(asked, SAMPLED)]
        for folder in others:
            if again:
                engine.sleep()
                engine.wake()
            engine.load_weights(folder)
            found.append(engine.generate(asked, SAMPLED))
    return found


@pytest.mark.parametrize(
    ("name", "tied"), [pytest.param(*case, marks=[] if case == DEFAULT else pytest.mark.slow) for case in CASES]
)
def test_new_weights_in_a_running_engine_answer_as_in_a_new_one(name: str, tied: bool, tmp_path: Path) -> None:
    """The same images were seen under the weights before: whatever a cache holds of them must be gone."""
    before = families.save(
        name, tmp_path / "before", ["what shape is it now?"], "student", tied, 0 if tied else PADDING
    )
    after = trained(before, tmp_path / "after")
    kept = call_in_process(answers, [before, after, before], True)
    (fresh,) = call_in_process(answers, [after], False)
    assert kept[1] == fresh
    assert kept[0] == kept[2] != fresh
