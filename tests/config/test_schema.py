"""Loading and validation of configurations: overrides, presets and error messages."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from masters.common.errors import InputError
from masters.config import presets
from masters.config.loading import load, override_values

DEMO = Path(__file__).parents[2] / "configs" / "easyvqa.toml"


@pytest.mark.parametrize("path", sorted(DEMO.parent.glob("*.toml")), ids=lambda p: p.name)
def test_every_configuration_of_the_repository_loads(path: Path) -> None:
    assert load(path).name == tomllib.loads(path.read_text())["name"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate=nan", "train.learning_rate"),
        ("train.learning_rate=-1", "train.learning_rate"),
        ("train.epochs=0", "train.epochs"),
        ("generate.top_p=1.5", "generate.top_p"),
        ("generate.responses=3", "student_share"),
        ("teachers.0.r_max=0.13", "multiple of mask_step"),
        ("teachers.7.r_max=0.2", "expected a number below 1"),
        ("train.targets=labels", "labels"),
        ("train.control=random_advantages train.objective=kd", 'needs objective "masters", found'),
        ("train.control=shuffled_verdicts train.objective=kd", 'or "sft" with targets = "responses"'),
        ("train.control=shuffled_verdicts train.objective=sft train.targets=labels", 'or "sft" with targets'),
        ("train.control=shuffled_verdicts rewards.accuracy=off", "shuffles the verdicts of rewards.accuracy"),
        ("rewards.accuracy=off rewards.combine=gated", "set both to .sum"),
        ("rewards.accuracy=off preset=recommended", "set both to .sum"),
        ("generate.student_share=1 train.balance=teacher_accuracy", "leaves without responses: set train.balance"),
        ("generate.refresh=stage train.targets=labels train.objective=kd", "does not use responses"),
        ("generate.refresh=stage generate.student_share=0.0", "raise generate.student_share, or set"),
        ("evaluate.split=validation", "needs data.validation_share above 0"),
        ("data.validation_share=1.0", "data.validation_share"),
        ("evaluate.accuracy=llm", "a teacher would judge its own answers"),
        ("rewards.judge_tokens=15", "rewards.judge_tokens"),
        (
            "rewards.accuracy=llm rewards.judge_tokens=4096",
            "leaves no room for a judge.s prompt",
        ),
        ("train.objective=sft rewards.accuracy=off", 'expected rewards.accuracy "llm" or "rules"'),
        ("trian.epochs=1", "trian: unknown key"),
        ("teachers.0.step=0.05", "teachers.0.step: unknown key, renamed to mask_step"),
        ("train.probe_drop=0.1", "train.probe_drop: unknown key, renamed to max_validation_drop"),
        ("runtime.silence_minutes=9", "runtime.silence_minutes: unknown key, renamed to heartbeat_timeout_minutes"),
        ("no_equals", "KEY=VALUE"),
        ("name=", "name"),
        ("store.root.deeper=1", "not a section"),
        (r'store.root="\u0020"', "found white space"),
    ],
)
def test_an_error_names_its_key(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(DEMO, override.split())


def test_an_objective_without_any_reward_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to reward"):
        load(DEMO, ["preset=paper", "rewards.accuracy=off", "rewards.distillation=off"])


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    marked = tmp_path / "marked.toml"
    marked.write_bytes(b"\xef\xbb\xbf" + DEMO.read_bytes())
    assert load(marked) == load(DEMO)


def test_models_may_lie_below_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = load(DEMO, ["student.model=~/m", "teachers.0.model=~/t", "rewards.judge=~/j"])
    names = [config.student.model, config.teachers[0].model, config.rewards.judge]
    assert names == [f"/home/someone/{name}" for name in "mtj"]
    assert load(DEMO, ["student.model=~nobody-of-this-name/m"]).student.model == "~nobody-of-this-name/m"


def test_overrides_are_toml_literals_or_strings() -> None:
    config = load(DEMO, ["train.epochs=7", "data.source=my.jsonl", "teachers.0.r_max=0.1", "generate.student_share=0"])
    assert (config.train.epochs, config.data.source, config.teachers[0].r_max) == (7, "my.jsonl", 0.1)
    assert (config.generate.teacher_responses, config.generate.student_responses) == (8, 0)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_sets_only_keys_that_file_and_overrides_leave_open(name: str) -> None:
    config = load(DEMO, [f"preset={name}", "train.beta=0.7"])
    found = {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in presets.get_preset(name)}
    assert found == presets.get_preset(name) | {"train.beta": 0.7}
    assert config.train.learning_rate == load(DEMO).train.learning_rate
    assert override_values(load(DEMO, ["train.divergence=kl"]), {"preset": name, "train.beta": 0.7}) == config


def test_all_presets_set_the_same_keys_and_the_recommended_one_is_the_default() -> None:
    assert len({frozenset(switches) for switches in presets.PRESETS.values()}) == 1
    assert load(DEMO) == load(DEMO, ["preset=recommended"]) != load(DEMO, ["preset=paper"])


@pytest.mark.parametrize("override", ["rewards.accuracy=off", "generate.student_share=1", "generate.student_share=1.0"])
def test_without_verdicts_on_the_teacher_the_terms_are_summed_by_default(override: str) -> None:
    config = load(DEMO, [override])
    assert config.train.balance == "sum"
    assert config.rewards.combine == ("sum" if "accuracy" in override else "gated")


def test_gated_rewards_need_an_accuracy_reward_only_if_rewards_are_used() -> None:
    off = ["preset=recommended", "rewards.accuracy=off"]
    assert load(DEMO, [*off, "train.objective=kd"]).rewards.combine == "gated"
    with pytest.raises(InputError, match="set both to"):
        load(DEMO, off)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(InputError, match="preset: expected one of paper"):
        load(DEMO, ["preset=best"])


def test_the_configuration_imports_neither_torch_nor_prefect() -> None:
    code = "import sys, masters.config, masters.cli.main; sys.exit('torch' in sys.modules or 'prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
