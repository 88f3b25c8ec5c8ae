"""Exact match after normalization."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masters.rewards.rules import exact_match, normalize


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"), ("  a\n b\t c ", "a b c"), ("Yes.", "yes"), ("no !?", "no"), ('"Teal"', "teal"),
        ("\u201cteal\u201d.", "teal"), ("\uff34\uff45\uff41\uff4c", "teal"), ("STRASSE", "strasse"),
        ("stra\u00dfe", "strasse"),
        ("3.5", "3.5"), (".5", ".5"), ("-1", "-1"), ("a, b", "a, b"), ("", ""), (" .!", ""),
    ],
)  # fmt: skip
def test_answers_are_normalized(text: str, expected: str) -> None:
    assert normalize(text) == expected


@given(st.text())
def test_normalized_white_space_is_single_and_inside(text: str) -> None:
    once = normalize(text)
    assert once == once.strip()
    assert "  " not in once


@pytest.mark.parametrize(
    ("text", "reference", "same"),
    [("Yes.", "yes", True), ("yes no", "yes", False), ("no", "yes", False), ("", "", False), ("5", ".5", False)],
)
def test_exact_match(text: str, reference: str, same: bool) -> None:
    assert exact_match(text, reference) is same
