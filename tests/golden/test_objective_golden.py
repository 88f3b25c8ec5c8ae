"""One fixed case: today's code and the float64 reference against numbers on record."""

import json

import numpy as np
import pytest

from tests.golden import regenerate
from tests.models import reference

GOLDEN = json.loads(regenerate.FILE.read_text(encoding="utf-8"))


def test_every_setting_is_on_record() -> None:
    assert set(GOLDEN) == set(regenerate.SETTINGS)


@pytest.mark.parametrize("setting", regenerate.SETTINGS)
def test_the_code_gives_the_golden_values(setting: str) -> None:
    found = regenerate.compute(*regenerate.SETTINGS[setting])
    assert set(found) == set(GOLDEN[setting])
    for name, value in found.items():
        np.testing.assert_allclose(value, GOLDEN[setting][name], rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("setting", regenerate.SETTINGS)
def test_the_golden_values_are_the_references(setting: str) -> None:
    train, rewards = regenerate.SETTINGS[setting]
    result = reference.objective(
        regenerate.case(), train.beta, train.divergence, rewards.accuracy, rewards.distillation
    )
    expected = {
        "loss": result.loss,
        "divergence": result.divergence_R,
        "distillation_reward": result.distill_R,
        "advantage": result.advantage_R,
        "gradient_norm": np.linalg.norm(result.gradient_TV),
    }
    for name, value in GOLDEN[setting].items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=5e-6, err_msg=name)
