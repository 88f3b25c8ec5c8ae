"""Loading and validation of a study file; an invalid one is refused with one line before anything runs."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from masters.common.errors import InputError
from masters.config.study_file import Study, arm_config, load_study

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs/studies/easyvqa.toml"
STUDY = f"""
name = "s"
config = "{ROOT}/configs/easyvqa.toml"
results = "results"
learning_rates = [2e-4, 1e-4]
seeds = [1, 2]
[base]
train.schedule = "cosine"
"teachers.0.r_max" = 0.1
[arms.plain]
[arms.other]
learning_rates = [1e-3]
train.objective = "kd"
"train.schedule" = "linear"
"""

PAIR = "comparisons = [{ better = 'plain', than = 'other' }]"


def write_study(folder: Path, text: str = STUDY) -> Path:
    (folder / "study.toml").write_text(text)
    return folder / "study.toml"


def test_an_arm_combines_the_base_configuration_shared_and_own_settings(tmp_path: Path) -> None:
    config, study = load_study(write_study(tmp_path))
    plain, other = (arm_config(config, study, arm) for arm in ("plain", "other"))
    assert (plain.train.schedule, other.train.schedule, other.train.objective) == ("cosine", "linear", "kd")
    assert plain.teachers[0].r_max == other.teachers[0].r_max == 0.1
    assert plain.data.validation_share == 0.1
    values = dict(train=config.train, teachers=config.teachers, data=config.data)
    assert other.model_copy(update=values) == config.model_copy(update=values)
    assert (study.rates("plain"), study.rates("other")) == ([1e-4, 2e-4], [1e-3])


@pytest.mark.parametrize("name", ["digits", "digits-pruned", "digits-middle", "easyvqa"])
def test_studies_with_committed_results_train_on_truncated_responses_as_those_did(name: str) -> None:
    config, study = load_study(ROOT / f"configs/studies/{name}.toml")
    assert {arm_config(config, study, arm).generate.truncated for arm in study.arms} == {"keep"}


def test_an_arms_preset_overrides_shared_keys_but_not_its_own(tmp_path: Path) -> None:
    shared = STUDY.replace("[base]", '[base]\ntrain.negatives = "none"\ntrain.beta = 0.0')
    config, study = load_study(
        write_study(tmp_path, shared + '[arms.paper]\npreset = "paper"\ntrain.divergence = "kl"\n')
    )
    paper = arm_config(config, study, "paper")
    assert (paper.train.negatives, paper.train.beta) == ("full", 0.1)  # the preset's
    assert (paper.train.divergence, paper.train.schedule) == ("kl", "cosine")
    assert arm_config(config, study, "plain").train.negatives == "none"


def test_folders_are_relative_to_the_studys_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, study = load_study(DEMO)
    assert config.name == "easyvqa" and study.results == str(DEMO.parent / "easyvqa")


def test_a_study_survives_serialization(tmp_path: Path) -> None:
    _, study = load_study(write_study(tmp_path))
    assert Study.model_validate_json(study.model_dump_json()) == study


def test_without_rates_to_choose_from_no_question_is_held_out(tmp_path: Path) -> None:
    single = STUDY.replace("[2e-4, 1e-4]", "[2e-4]").replace("seeds = [1, 2]", "seeds = [0]\nvalidation.share = 0")
    config, study = load_study(write_study(tmp_path, single))
    assert study.seeds == study.tuning_seeds == [0]
    assert arm_config(config, study, "plain").data == config.data


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "s"', 'nmae = "s"', "name: missing; nmae: unknown key"),
        ("seeds = [1, 2]", "seeds = []", "seeds: List should have at least 1"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "seeds: expected each value once"),
        ("seeds = [1, 2]", "seeds = [0, 1]", r"other seeds than tuning_seeds, found \[0\]"),
        ("[2e-4, 1e-4]", "[]", "learning_rates: List should have at least 1"),
        ("[2e-4, 1e-4]", "[2e-4, 2e-4]", "learning_rates: expected each value once"),
        ("[1e-3]", "[1e-3, 1e-3]", "arms.other.learning_rates: expected each value once"),
        ("[1e-3]", "[-1e-3]", "arms.other.learning_rates.0"),
        ("[arms.plain]", "[arms.'no name']", "no name"),
        ("[arms.plain]", "[arms.plain]\ntrain.bta = 1", "arm plain: .*train.bta: unknown key"),
        ("[arms.plain]", "[arms.plain]\ntrain.seed = 1", "arms.plain: train.seed cannot be set here"),
        ("[arms.plain]", "[arms.plain]\nlearning_rate = 1", "learning_rate: unknown key"),
        ("[arms.plain]", "[arms.plain]\nevaluate.split = 'test'", "evaluate.split cannot be set here"),
        ("[base]", "[base]\nstore.root = 'a'", "base: store.root cannot be set here"),
        ("[base]", "[base]\nteachers.7.r_max = 0.1", "expected a number below 1"),
        ("[base]", "[validation]\nshare = 0.0\n[base]", "validation.share: expected more than 0"),
        ("[arms.plain]", "[[comparisons]]\nbetter = 'plain'\nthan = 'none'\n[arms.plain]", "found none"),
        ("[arms.plain]", "[[comparisons]]\nbetter = 'plain'\nthan = 'plain'\n[arms.plain]", "found plain twice"),
        ("seeds = [1, 2]", f"seeds = [1]\n{PAIR}", "seeds: expected at least 2, as arms are compared"),
        ("configs/easyvqa.toml", "configs/none.toml", "configuration not found"),
    ],
)
def test_an_invalid_study_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert STUDY.count(old) == 1
    with pytest.raises(InputError, match=message) as refused:
        load_study(write_study(tmp_path, STUDY.replace(old, new)))
    assert "\n" not in str(refused.value)


def test_every_study_of_the_repository_loads() -> None:
    files = sorted((ROOT / "configs/studies").glob("*.toml"))
    assert files
    for file in files:
        config, study = load_study(file)
        content: dict[str, Any] = tomllib.loads(file.read_text())
        assert study.arms.keys() == content["arms"].keys() and config.name
