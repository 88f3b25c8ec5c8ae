"""A judge in an engine is refused if it could not be asked anything; a template without a system turn is served."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoProcessor

from masters.checks.local_judge import check_judge_prompt
from masters.checks.model_folder import LocalModel
from masters.common.errors import InputError
from masters.config import Config
from masters.models.prompts import tokenize_conversation
from masters.rewards.judge_prompts import grading_conversation, merge_system_turn, score_conversation
from masters.rewards.verdict import Triple
from tests.command_line import ROOT

JUDGE = ROOT / "demo/models/judge"
CONVERSATIONS = (grading_conversation(Triple("what color?", "teal", "red")), score_conversation("<answer>0</answer>"))
REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def make_config(**changes: object) -> Config:
    values = dict(
        name="judged",
        store=dict(root="s"),
        data=dict(source="none"),
        student=dict(model="s"),
        teachers=[dict(model="t")],
        rewards=dict(accuracy="llm", judge_tokens=changes.pop("judge_tokens", None)),
        runtime=changes,
    )
    return Config.model_validate(values)


def copy_judge(target: Path, template: str) -> LocalModel:
    shutil.copytree(JUDGE, target)
    (target / "chat_template.jinja").write_text(template)
    return LocalModel("judge", target, "0" * 64)


def template() -> str:
    return (JUDGE / "chat_template.jinja").read_text()


@pytest.mark.parametrize("limits", [dict(max_model_len=512), dict(max_model_len=512, judge_tokens=300)])
def test_a_judge_with_room_is_taken(limits: dict) -> None:
    check_judge_prompt(LocalModel("judge", JUDGE, "0" * 64), make_config(**limits))


@pytest.mark.parametrize("limits", [dict(max_model_len=260), dict(max_model_len=512, judge_tokens=400)])
def test_a_judge_without_room_for_prompt_and_reply_is_refused(limits: dict) -> None:
    with pytest.raises(InputError, match=r"judge: .* tokens .*raise runtime\.max_model_len"):
        check_judge_prompt(LocalModel("judge", JUDGE, "0" * 64), make_config(**limits))


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("kind", ["refuses", "leaves out"])
def test_a_template_without_a_system_turn_gets_its_text_in_the_users_turn(
    tmp_path: Path, kind: str, conversation: list[dict[str, str]]
) -> None:
    leaves_out = template().replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    judge = copy_judge(tmp_path / "judge", REFUSES_SYSTEM + template() if kind == "refuses" else leaves_out)
    check_judge_prompt(judge, make_config(max_model_len=512))
    changed, usual = (AutoProcessor.from_pretrained(folder) for folder in (judge.folder, JUDGE))
    merged = merge_system_turn(conversation)
    assert [turn["role"] for turn in merged] == ["user"]
    expected = tokenize_conversation(usual, usual.tokenizer, merged)
    assert expected and tokenize_conversation(changed, changed.tokenizer, conversation) == expected


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("{{ raise_exception('only images') }}", "only images"),
        ("{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}", "leaves out"),
        ("{{ messages[0]['content'] }}", "leaves out"),
    ],
)
def test_a_template_that_makes_no_prompt_of_a_text_is_refused(tmp_path: Path, broken: str, says: str) -> None:
    with pytest.raises(InputError, match=rf"judge: its chat template .*{says}.*choose another judge"):
        check_judge_prompt(copy_judge(tmp_path / "judge", broken), make_config(max_model_len=512))
