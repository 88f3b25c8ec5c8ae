"""Unique names of models in tables, and the checks of teacher and student as a pair."""

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masters.checks.model_folder import STUDENT_NAMES, LocalModel, check_pair, disambiguate_names, find_model
from masters.common.errors import InputError
from masters.config import Model
from tests.command_line import ROOT

MODELS = st.builds(
    LocalModel,
    name=st.sampled_from(["final", "last", *STUDENT_NAMES]),
    folder=st.just(Path("/models")),
    digest=st.sampled_from([letter * 64 for letter in "abc"]),
)


@given(st.lists(MODELS, max_size=6))
def test_equal_names_mean_equal_models(models: list[LocalModel]) -> None:
    named = disambiguate_names(models)
    assert [model.digest for model in named] == [model.digest for model in models]
    assert len({model.name for model in named}) == len({(model.name, model.digest) for model in models})
    assert not any(model.name in STUDENT_NAMES for model in named)


@given(st.lists(MODELS, max_size=6))
def test_a_unique_name_is_kept(models: list[LocalModel]) -> None:
    for before, after in zip(models, disambiguate_names(models), strict=True):
        shared = any(other.name == before.name and other.digest != before.digest for other in models)
        assert (after.name == before.name) == (not shared and before.name not in STUDENT_NAMES)


@pytest.mark.parametrize(
    ("file", "old", "new", "difference"),
    [
        ("chat_template.jinja", "{%", "Look.{%", "different tokens|tokens with a small image"),
        (
            "processor_config.json",
            '"longest_edge": 4096',
            '"longest_edge": 16384',
            "41 and 41 tokens with a small image, 79 and 37 with a large one",
        ),
        ("processor_config.json", "0.5,", "0.25,", "different pixels"),
    ],
)
def test_models_with_different_prompts_are_refused(
    file: str, old: str, new: str, difference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same tokenizer, same family: a response would be sampled after one prompt and learned after another."""
    monkeypatch.setenv("HOME", str(tmp_path))
    student = find_model(Model(model=str(ROOT / "demo/models/student")))
    check_pair(find_model(Model(model=str(ROOT / "demo/models/teacher"))), student)
    folder = shutil.copytree(ROOT / "demo/models/teacher", tmp_path / "teacher")
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=f"make different prompts of one question and image: .*({difference})"):
        check_pair(find_model(Model(model=str(folder))), student)
