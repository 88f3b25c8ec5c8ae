"""A chat template that ends the prompt inside a thought is found, whatever its mark, and `check` warns of it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from masters.checks.model_folder import find_model
from masters.checks.preflight import list_warnings
from masters.checks.processor import find_opened_thought
from masters.config import Model
from masters.config.loading import load
from tests.command_line import ROOT

STUDENT = ROOT / "demo/models/student"
TURN = "<|im_start|>assistant\n"
TEMPLATE = (STUDENT / "chat_template.jinja").read_text()


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(STUDENT)


@pytest.mark.parametrize(
    ("end", "mark"),
    [
        ("<think>\n", "<think>"),
        ("<think>", "<think>"),
        ("<thinking>\n", "<thinking>"),
        ("<Think >\nOkay, ", "<Think >"),
        ("[THINK]", "[THINK]"),
        ("<|begin_of_thought|>\n", "<|begin_of_thought|>"),
        ("\u25c1think\u25b7", "\u25c1think\u25b7"),
        ("<seed:think>", "<seed:think>"),
        ("<|START_THINKING|>", "<|START_THINKING|>"),
        ("<scratchpad>\n", "<scratchpad>"),
        ("<|channel|>analysis<|message|>", "<|channel|>analysis"),
        ("<|channel>thought\n", "<|channel>thought"),
        ("<|channel>thought\n<channel|>", ""),
        ("<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>", ""),
        ("<|START_THINKING|><|END_THINKING|>", ""),
        ("<think>\n\n</think>\n\n<think>\n", "<think>"),
        ("", ""),
        ("<think>\n\n</think>\n\n", ""),
        ("[THINK][/THINK]", ""),
        ("<|begin_of_thought|><|end_of_thought|>", ""),
        ("<answer>", ""),
    ],
)
def test_only_a_thought_that_stays_open_is_found(processor: Any, end: str, mark: str) -> None:
    assert TURN in TEMPLATE
    processor.chat_template = TEMPLATE.replace(TURN, TURN + end)
    assert find_opened_thought(processor) == mark


def test_check_warns_of_a_template_that_opens_a_thought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load(ROOT / "configs/easyvqa.toml")
    assert list_warnings(config, find_model(Model(model=str(STUDENT)))) == []
    folder = shutil.copytree(STUDENT, tmp_path / "thinks")
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace(TURN, TURN + "<think>\n"))
    (warning,) = list_warnings(config, find_model(Model(model=str(folder))))
    assert "thinks opens a thought: prompts end inside <think>" in warning and "generate.max_tokens" in warning
