"""The tokens that `negatives = "first_difference"` spares: worked examples, and random tokens against the reference."""

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from masters.models.training.first_difference import spared_tokens
from tests.models.compare_with_reference import packed
from tests.models.float64_reference import Batch, is_before_first_difference

NAN = math.nan
response = st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=4).map(tuple), st.sampled_from([0.0, 1.0, NAN]))


def spared(questions: list[list[tuple[tuple[int, ...], float]]]) -> tuple[Batch, list[bool]]:
    tokens = [[response for response, _ in one] for one in questions]
    batch = Batch(tokens, [[score for _, score in one] for one in questions], *(np.empty(0),) * 3)
    score_R = torch.tensor([score for one in batch.scores for score in one])
    return batch, spared_tokens(packed(batch), score_R).tolist()


def test_the_longest_prefix_shared_with_a_right_response_is_spared() -> None:
    right, other, wrong, cut, apart = (1, 2, 3, 9), (1, 2, 4, 5, 9), (1, 2, 4, 6, 9), (1, 2), (7, 2, 3, 9)
    _, found = spared([[(right, 1.0), (other, 1.0), (wrong, 0.0), (cut, 0.0), (apart, 0.0)]])
    assert found[9:] == [True, True, True, False, False] + [True, True] + [False] * 4
    assert all(found[:9])  # the right ones as a whole


def test_without_a_right_response_nothing_is_spared() -> None:
    """A missing verdict is not right; responses to another question do not count."""
    _, found = spared([[((1, 2), 0.0), ((1, 3), NAN), ((1, 2), 0.25)], [((1, 2), 1.0)]])
    assert found == [False] * 6 + [True] * 2


@given(st.lists(st.lists(response, min_size=1, max_size=5), min_size=1, max_size=3))
def test_spared_tokens_equal_those_of_the_reference(questions: list) -> None:
    batch, found = spared(questions)
    assert found == is_before_first_difference(batch).tolist()
