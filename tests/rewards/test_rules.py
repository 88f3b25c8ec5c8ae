"""The rule-based verdict: what counts as the same answer."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masters.rewards import rule_accuracy
from masters.rewards.rules import exact_match, normalise


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
    assert normalise(text) == expected


@given(st.text())
def test_normalised_white_space_is_single_and_inside(text: str) -> None:
    once = normalise(text)
    assert once == once.strip()
    assert "  " not in once


@pytest.mark.parametrize(
    ("text", "reference", "same"),
    [("Yes.", "yes", True), ("yes no", "yes", False), ("no", "yes", False), ("", "", False), ("5", ".5", False)],
)
def test_exact_match(text: str, reference: str, same: bool) -> None:
    assert exact_match(text, reference) is same


@pytest.mark.parametrize(("text", "score"), [("Blue!", 1.0), ("red", 0.0), ("", 0.0), ("   ", 0.0)])
def test_rule_accuracy_is_always_a_verdict(text: str, score: float) -> None:
    verdict = rule_accuracy("What color?", "blue", text)
    assert (verdict.score, verdict.status) == (score, "ok")
    assert "'blue'" in verdict.explanation


def test_a_verdict_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule_accuracy("?", "a", "b").score = 1.0
