"""A training of 20 steps against the curve on record: what no single test of a formula would notice."""

import json

import pytest

from masters.config import Train
from tests.golden.regenerate import COLUMNS, FILE, STEPS, loss_curve

GOLDEN = json.loads(FILE.read_text(encoding="utf-8"))
TOLERANCE = 1e-3  # relative; weights that differ by 2e-7, as sums in another order do, move the curve by up to 3e-5


def test_training_follows_the_golden_curve() -> None:
    found = loss_curve()
    assert len(found) == len(GOLDEN) == STEPS
    for number, (step, expected) in enumerate(zip(found, GOLDEN, strict=True), 1):
        for name in COLUMNS:
            assert step[name] == pytest.approx(expected[name], rel=TOLERANCE, abs=1e-5), (number, name)


@pytest.mark.parametrize("settings", [dict(beta=0.11), dict(learning_rate=1.05e-3), dict(divergence="kl")])
def test_a_small_change_of_the_method_leaves_the_curve(settings: dict) -> None:
    found = loss_curve(Train.model_validate(dict(learning_rate=1e-3) | settings))
    apart = [abs(step["loss"] / expected["loss"] - 1) for step, expected in zip(found, GOLDEN, strict=True)]
    assert max(apart) > 3 * TOLERANCE
