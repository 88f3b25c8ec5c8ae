"""A grid is understood, or refused, before anything runs."""

from pathlib import Path

import pytest

from masters.config_file import load
from masters.errors import InputError
from masters.flows.ablate import cells

DEMO = load(Path(__file__).parents[2] / "configs/demo.toml")


def test_every_combination_has_its_values_and_a_name_of_its_own() -> None:
    every = cells(DEMO, {"train.beta": [0, 0.1], "rewards.distillation": ["minmax", "off"], "teachers.0.r_max": [0.1]})
    found = [(c.config.train.beta, c.config.rewards.distillation, c.config.teachers[0].r_max) for c in every]
    assert found == [(0, "minmax", 0.1), (0, "off", 0.1), (0.1, "minmax", 0.1), (0.1, "off", 0.1)]
    assert every[0].config.name == "easyvqa-1-beta-0-distillation-minmax-r-max-0-1"
    assert len({c.config.name for c in every}) == 4
    assert every[3].config.model_copy(update={"name": DEMO.name, "teachers": DEMO.teachers}) == DEMO.model_copy(
        update={"rewards": DEMO.rewards.model_copy(update={"distillation": "off"})}
    )


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ({}, "at least one key"),
        ({"train.beta": []}, "at least one key"),
        ({"train.bta": [1]}, "train.bta: unknown key"),
        ({"train.beta": [0.1, "much"]}, "train.beta"),
        ({"train.objective": ["masters", "sft"]}, "sft"),
        ({"teachers.1.r_max": [0.1]}, "expected a number below 1"),
        ({"store.root": ["a"]}, "not a switch"),
        ({"name": ["a"]}, "not a switch"),
    ],
)
def test_a_grid_that_cannot_work_is_refused(grid: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        cells(DEMO, grid)
