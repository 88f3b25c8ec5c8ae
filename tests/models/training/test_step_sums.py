"""Sums over passes and ranks: however a step is cut, its means are the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masters.models.training import step_sums
from masters.models.training.step_sums import DENOMINATORS, LARGEST, means, merged
from masters.store import tables

names = st.sampled_from(["loss", *DENOMINATORS, *DENOMINATORS.values(), *LARGEST])
parts = st.lists(st.dictionaries(names, st.integers(0, 9).map(float)), min_size=1, max_size=6)


@given(parts, st.integers(0, 6))
def test_passes_and_ranks_may_be_added_in_any_grouping(of: list[dict[str, float]], cut: int) -> None:
    whole = merged(of)
    assert merged([merged(of[:cut]), {}, merged(of[cut:])]) == whole
    for name, value in whole.items():
        known = [part[name] for part in of if name in part]
        assert value == (max(known) if name in LARGEST else sum(known))


def test_a_mean_is_over_what_is_counted_and_left_out_where_nothing_is() -> None:
    sums = {"loss": 6.0, "largest_token_kl": 0.5, "entropy": 3.0, "tokens": 4.0, "rare_negatives": 1.0}
    sums |= {"greedy_end": 0.0, "ended_responses": 0.0}
    assert means(sums, 3) == {"loss": 2.0, "largest_token_kl": 0.5, "entropy": 0.75, "rare_negatives": 0.25}


@pytest.mark.parametrize("name", [*step_sums.DENOMINATORS, *step_sums.LARGEST])
def test_the_history_has_a_column_for_each(name: str) -> None:
    assert name in tables.HISTORY.names
