"""`masters check --parity` with the demo models and every family, vLLM and PyTorch."""

from pathlib import Path

import pytest

from demo import families, shapes
from tests.command_line import masters, options
from tests.flows.test_families import write_data
from tests.models.padded_models import save_padded
from tests.shape_data import QUESTIONS


def verdicts(output: str) -> list[str]:
    return [line.split()[0] for line in output.splitlines() if "(limit" in line]


@pytest.mark.slow
def test_the_demo_models_pass_the_parity_check(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    arguments = ("--set", f"store.root={tmp_path / 'store'}", "--parity")
    done = masters("check", "configs/easyvqa.toml", *arguments, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    # two of packing a model, the student whole, the teacher at five mask ratios
    assert verdicts(done.stdout) == ["ok"] * 10


@pytest.mark.slow
@pytest.mark.parametrize("name", families.NAMES)
def test_a_family_passes_the_parity_check_on_its_own_data(name: str, tmp_path: Path) -> None:
    """The teacher's embedding is padded with garbage, as no tokenizer of a published model fills it."""
    (tmp_path / "home").mkdir()
    texts = [*QUESTIONS, *shapes.SHAPES, *shapes.COLORS, "yes", "no"]
    teacher = families.save(name, tmp_path / "whole", texts, "teacher", False)
    values = {
        "store.root": tmp_path / "store",
        "data.source": write_data(tmp_path / "data", 8),
        "student.model": families.save(name, tmp_path / "student", texts, "student", seed=1),
        "teachers.0.model": save_padded(teacher, tmp_path / "teacher", 12),
        "teachers.0.r_max": 0.4,
        "teachers.0.mask_step": 0.2,
        "runtime.max_model_len": 128,
    }
    done = masters("check", "configs/easyvqa.toml", *options(values), "--parity", home=tmp_path / "home")
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    assert verdicts(done.stdout) == ["ok"] * 8
