"""The mask schedule against a table written by hand and against Eq. 3 in exact arithmetic."""

import math
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masters.common.hashing import digest
from masters.config.mask_schedule import mask_ratio, mask_ratios, mask_stage_of
from tests.models import float64_reference


def test_mask_ratios_of_ten_iterations() -> None:
    found = [mask_ratio(i, 10, 0.2, 0.05) for i in range(1, 11)]
    assert found == [0.2, 0.15, 0.15, 0.1, 0.1, 0.05, 0.05, 0.0, 0.0, 0.0]


@given(st.integers(0, 20), st.sampled_from(["0.05", "0.04", "0.025", "0.01"]), st.integers(1, 300), st.data())
def test_mask_ratio_follows_equation_3_exactly(k: int, step: str, iterations: int, data: st.DataObject) -> None:
    s = Fraction(step)
    r_max = k * s
    i = data.draw(st.integers(1, iterations))
    expected = float64_reference.mask_ratio(i, iterations, r_max, s)
    found = mask_ratio(i, iterations, float(r_max), float(s))
    assert found == round(float(expected), 6)
    assert found in mask_ratios(float(r_max), float(s))


def test_mask_ratios_of_the_stages() -> None:
    assert mask_ratios(0.2, 0.05) == [0.2, 0.15, 0.1, 0.05, 0.0]
    assert mask_ratios(3 * 0.05, 0.05) == [0.15, 0.1, 0.05, 0.0]  # 0.15000000000000002
    assert mask_ratios(0.0, 0.05) == [0.0]
    assert mask_ratios(1.0, 0.5) == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("iteration", "iterations", "r_max", "step"),
    [
        (0, 10, 0.2, 0.05), (11, 10, 0.2, 0.05), (1, 0, 0.2, 0.05), (1, 10, 0.2, 0.03), (1, 10, 0.2, 0.0),
        (1, 10, 0.2, -0.1), (1, 10, -0.2, 0.05), (1, 10, 1.2, 0.05), (1, 10, math.nan, 0.05), (1, 10, 0.2, math.nan),
    ],
)  # fmt: skip
def test_invalid_arguments_raise_value_error(iteration: int, iterations: int, r_max: float, step: float) -> None:
    with pytest.raises(ValueError, match=r"found|multiple"):
        mask_ratio(iteration, iterations, r_max, step)


def test_mask_stage_of_divides_the_unit_interval_equally() -> None:
    assert [mask_stage_of(f"{digit:x}" + "0" * 63, 4) for digit in range(16)] == [d // 4 for d in range(16)]
    assert mask_stage_of("f" * 64, 5) == 4
    assert {mask_stage_of(digest(str(n).encode()), 1) for n in range(100)} == {0}
    for stages in (3, 5, 9):
        digests = ["0" * 64, "f" * 64, *(digest(str(n).encode()) for n in range(200))]
        assert [mask_stage_of(d, stages) for d in digests] == [float64_reference.stage(d, stages) for d in digests]


def test_mask_stages_get_equal_shares_of_the_questions() -> None:
    counts = [0] * 5
    for n in range(5000):
        counts[mask_stage_of(digest(f"question {n}".encode()), 5)] += 1
    assert all(abs(count - 1000) < 5 * math.sqrt(5000 * 0.2 * 0.8) for count in counts)


def test_imports_no_torch() -> None:
    code = "import sys, masters.config.mask_schedule, masters.rewards.verifiers; "
    subprocess.run([sys.executable, "-c", code + "assert not {'torch', 'sympy'} & sys.modules.keys()"], check=True)
