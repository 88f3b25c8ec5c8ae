"""The means of a step do not depend on how it is divided into passes and ranks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masters.models.training import step_metrics
from masters.models.training.step_metrics import DENOMINATORS, LARGEST, means, merge
from masters.store import tables

names = st.sampled_from(["loss", *DENOMINATORS, *DENOMINATORS.values(), *LARGEST])
parts = st.lists(st.dictionaries(names, st.integers(0, 9).map(float)), min_size=1, max_size=6)


@given(parts, st.integers(0, 6))
def test_sums_are_associative(of: list[dict[str, float]], cut: int) -> None:
    whole = merge(of)
    assert merge([merge(of[:cut]), {}, merge(of[cut:])]) == whole
    for name, value in whole.items():
        known = [part[name] for part in of if name in part]
        assert value == (max(known) if name in LARGEST else sum(known))


def test_means_have_their_own_denominators_and_are_left_out_where_these_are_0() -> None:
    sums = {"loss": 6.0, "largest_token_kl": 0.5, "entropy": 3.0, "tokens": 4.0, "rare_negatives": 1.0}
    sums |= {"greedy_end": 0.0, "ended_responses": 0.0}
    assert means(sums, 3) == {"loss": 2.0, "largest_token_kl": 0.5, "entropy": 0.75, "rare_negatives": 0.25}


@pytest.mark.parametrize("name", [*step_metrics.DENOMINATORS, *step_metrics.LARGEST])
def test_the_history_table_has_a_column_for_each_mean(name: str) -> None:
    assert name in tables.HISTORY.names
