"""The folder of a trained student: what of its generation settings it takes over from the student it started from."""

import json
import shutil
from pathlib import Path

import pytest

from demo import families
from masters.models.model_loading import export_student, load_model

DEMO = Path(__file__).parents[2] / "demo/models"
GENERATION = "generation_config.json"
SAMPLING = dict(do_sample=True, top_k=20, top_p=0.8, temperature=0.7, repetition_penalty=1.05, min_p=0.1)
LIMITS = dict(max_new_tokens=1, max_length=7, min_new_tokens=1, suppress_tokens=[20, 21], bad_words_ids=[[20]])
TOKENS = dict(bos_token_id=1, eos_token_id=[2, 0], pad_token_id=0)
NAMES_OF_TRANSFORMERS = {"_from_model_config", "transformers_version"}


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO / "student", tmp_path / "student"))


def export(student: Path) -> tuple[list[str], dict]:
    """Return the names of the dropped settings, and the exported student's generation settings."""
    out = student.parent / "out"
    trained = {name: p.detach() for name, p in load_model(student, "float32").named_parameters()}
    dropped = export_student(trained, student, out)
    return dropped, json.loads((out / GENERATION).read_text())


@pytest.mark.parametrize(
    "settings",
    [SAMPLING, LIMITS, SAMPLING | LIMITS, dict(do_sample=False, temperature=0.1), dict(a_later_one=3)],
    ids=["sampling", "limits", "both", "contradicting", "unknown"],
)
def test_only_token_ids_are_taken_over(student: Path, settings: dict) -> None:
    (student / GENERATION).write_text(json.dumps(TOKENS | settings))
    dropped, exported = export(student)
    assert set(dropped) == settings.keys()
    assert {k: v for k, v in exported.items() if k not in NAMES_OF_TRANSFORMERS} == TOKENS


@pytest.mark.parametrize("name", ["student", "digits-student", "captions-student"])
def test_settings_of_a_student_without_any_are_taken_over_as_they_are(name: str, tmp_path: Path) -> None:
    student = Path(shutil.copytree(DEMO / name, tmp_path / "student"))
    dropped, exported = export(student)
    assert dropped == [] and exported == json.loads((student / GENERATION).read_text())


@pytest.mark.parametrize("name", families.NAMES)
def test_a_student_without_settings_keeps_its_end_token(name: str, tmp_path: Path) -> None:
    student = families.save(name, tmp_path / "student", ["what shape is it?"])
    (student / GENERATION).unlink()
    dropped, exported = export(student)
    assert dropped == [] and exported["eos_token_id"] == families.TURNS.index("<|im_end|>")
