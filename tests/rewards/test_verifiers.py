"""Verifiers: examples of right and wrong answers, and properties that hold for any text."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import product
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from masters.common.errors import WorkerError
from masters.config import Answers
from masters.rewards import number, verifiers
from masters.rewards.choice import named_letters
from masters.rewards.final_answer import final_part
from masters.rewards.rules import exact_match
from masters.rewards.verdict import Triple
from masters.rewards.verifiers import VERIFIERS, IsRight, open_verifier

# texts that look like answers, with combinations of markers, letters and numbers; and any text
PIECES = [
    "#### ",
    "\\boxed{",
    "}",
    "=",
    ":",
    " answer is ",
    "B",
    "(c)",
    "A ",
    "11",
    ".5",
    "1/2",
    "\\frac{1}{2}",
    "$",
    " ",
]
LIKELY = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
# lone surrogates too: no tokenizer produces them, but they must not end a run
TEXTS = LIKELY | st.text(max_size=60) | st.text(st.characters(), max_size=10)


@pytest.fixture(scope="module", params=[*VERIFIERS, "pattern"])
def is_right(request: pytest.FixtureRequest) -> Iterator[IsRight]:
    answers = Answers(verifier="final", final_pattern=r"<(\w+)>") if request.param == "pattern" else None
    with open_verifier(answers or Answers(verifier=request.param)) as checks:
        yield checks


@pytest.fixture(scope="module")
def equal_numbers() -> Iterator[Callable[[str, str], bool]]:
    with number.number_comparison() as equal:
        yield equal


def right(verifier: str, text: str, *accepted: str, **options: str) -> bool:
    with open_verifier(Answers.model_validate(dict(verifier=verifier) | options)) as checks:
        return checks(text, accepted)


def test_every_verifier_of_the_configuration_is_registered_under_a_name_of_its_own() -> None:
    assert set(get_args(Answers.model_fields["verifier"].annotation)) == VERIFIERS.keys()
    for name in ("label", "metric"):
        assert len({getattr(verifier, name) for verifier in VERIFIERS.values()}) == len(VERIFIERS)


@settings(deadline=None, max_examples=200)
@given(text=TEXTS, reference=TEXTS)
def test_a_verifier_returns_a_boolean_for_any_text(is_right: IsRight, text: str, reference: str) -> None:
    assert is_right(text, [reference]) in (True, False)


@settings(deadline=None)
@given(text=TEXTS, reference=TEXTS)
def test_every_verifier_accepts_exact_matches(is_right: IsRight, text: str, reference: str) -> None:
    assert is_right(text, [reference]) or not exact_match(text, reference)
    assert is_right(f' "{text.upper()}". ', [text]) or not exact_match(text.upper(), text)


@settings(deadline=None)
@given(text=TEXTS, accepted=st.lists(TEXTS, max_size=4), more=TEXTS)
def test_a_text_is_right_exactly_if_one_accepted_answer_makes_it_right(is_right, text, accepted, more) -> None:
    alone = [is_right(text, [one]) for one in accepted]
    assert is_right(text, accepted) == any(alone)
    assert is_right(text, [*accepted, more]) >= is_right(text, accepted)


@settings(deadline=None)
@given(text=TEXTS, accepted=st.lists(TEXTS, min_size=1, max_size=3))
def test_empty_texts_are_never_right(is_right: IsRight, text: str, accepted: list[str]) -> None:
    assert not is_right("", accepted) and not is_right(" \n", accepted)


# final


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("11", "11"), ("4 + 0 + 7 = 11", "11"), ("4 = 4\nso 4 + 7 = 11.", "11"), ("a == b", "b"), ("#### 11", "11"),
        ("The answer is: Teal.", "teal"), ("THE ANSWER IS teal", "teal"), ("Answer:5", "5"), ("Step 2: 11", "11"),
        ("It is teal\uff1a Red", "red"),
        (r"so \boxed{11}.", "11"), (r"$\boxed{\frac{1}{2}}$ = 0.5", r"\frac{1}{2}"), (r"$\boxed{x = 5}$", "5"),
        (r"\boxed{1} and \boxed{2}", "2"), (r"\boxed{5", "5"),
        ("12:30", "12:30"), ("The time is: 12:30", "12:30"), ("3 : 4", "3 : 4"),
        ("4 + 0 => 4", "4"),
        ("x <= 5", "x <= 5"), ("x != 5", "x != 5"), ("10 =", "10 ="), ("=", "="), ("the answer is", "the answer is"),
        (r"\boxed{}", r"\boxed{}"), ("", ""),
    ],
)  # fmt: skip
def test_the_final_part_stands_after_the_last_marker(text: str, final: str) -> None:
    assert final_part(text) == final


STEPWISE = ["11", "4 + 0 + 7 = 11", "#### 11", "The answer is 11.", "Answer: 11", r"So $\boxed{11}$."]


@pytest.mark.parametrize(("text", "reference"), list(product(STEPWISE, STEPWISE)))
def test_stepwise_and_short_answers_are_the_same_to_final(text: str, reference: str) -> None:
    assert right("final", text, reference)
    assert not right("final", text.replace("11", "12"), reference)


@settings(deadline=None)
@given(text=TEXTS, reference=TEXTS)
def test_final_is_symmetric(text: str, reference: str) -> None:
    assert right("final", text, reference) == right("final", reference, text)


@pytest.mark.parametrize(
    ("pattern", "text", "reference", "same"),
    [
        (r"<(\w+)>", "<red> no, <blue>", "blue", True), (r"<(\w+)>", "<red> no, <blue>", "red", False),
        (r"<(\w+)>", "blue", "<Blue>", True), (r"\d+", "It has 3 or 4", "4", True),
        (r"(?:is (\w+))|(\d+)", "it has 4", "4", True), (r"<(\w+)>", "x = blue", "blue", False),
        (r"z*", "blue", "red", False),
    ],
)  # fmt: skip
def test_a_pattern_replaces_the_markers(pattern: str, text: str, reference: str, same: bool) -> None:
    assert right("final", text, reference, final_pattern=pattern) is same


@pytest.mark.timeout(60)
def test_a_final_pattern_takes_bounded_time() -> None:
    text = "a" * 300_000
    for pattern in (r"(a+)+$", r"a.*b|a", r"(\w+\s?)+!"):
        started = time.monotonic()
        right("final", text, "b", final_pattern=pattern)
        assert time.monotonic() - started < 10


# choice


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("B", "B"), ("b", "B"), ("(B)", "B"), ("[b]", "B"), ("B.", "B"), ("B)", "B"), ("**B**", "B"), ("\uff22", "B"),
        ("B. a cat", "B"), ("(b) a cat", "B"), ("B: A cat", "B"), ("B. Vitamin C", "B"),
        ("The answer is B.", "B"), ("Answer: (b)", "B"), ("The answer is B. Vitamin C", "B"),
        ("answer is: B) a dog", "B"),
        ("B is the correct answer.", "B"), ("option C", "C"), ("A cat is in B", "B"), ("I think it's B", "B"),
        ("Option A: a cat. Option B: a dog. The answer is B", "B"), ("A is wrong. The answer is B", "B"), ("A", "A"),
        ("A or B", "AB"), ("A, B", "AB"), ("A. B", "AB"), ("(A) (B)", "AB"), ("The answer is A or B", "AB"),
        ("The answer is A. No, the answer is B", "AB"), ("B/C", "BC"), ("B. or C", "BC"),
        ("a cat", ""), ("The answer is a cat", ""), ("A cat", ""), ("I see", ""), ("", ""), ("XDY2K", ""),
    ],
)  # fmt: skip
def test_named_letters(text: str, named: str) -> None:
    assert named_letters(text) == set(named)


@pytest.mark.parametrize("reference", ["B", "b", "(B)", "B.", "B. a cat", "B) a cat", "(b) A cat"])
def test_the_reference_letter_is_right(reference: str) -> None:
    for text in ("B", "(b)", "B. a cat", "The answer is B."):
        assert right("choice", text, reference)
    for text in ("C", "A. a cat", "A or B", "a cat", "none", ""):
        assert not right("choice", text, reference)


@pytest.mark.parametrize("reference", ["a cat", "cat", "A cat", "12", "blue (or B)"])
def test_a_reference_without_a_letter_only_matches_exactly(reference: str) -> None:
    assert right("choice", reference.upper(), reference)
    assert not any(right("choice", text, reference) for text in ("A", "B", "C", "dog"))


# number


@pytest.mark.parametrize(
    ("text", "reference", "same"),
    [
        ("1/2", "0.5", True), ("0.5", r"\frac{1}{2}", True), (r"\frac{1}{2}", "1/2", True), ("1,000", "1000", True),
        ("1 000", "1000", True), ("11.", "11", True), ("11", "11.0", True), ("4 + 0 + 7 = 11", "11", True),
        ("The answer is 11.", "4 + 0 + 7 = 11", True), (r"so \boxed{12}", "12", True), ("$12", "12", True),
        ("12 cm", "12", True), ("-0.5", "-1/2", True), ("\u22123", "-3", True), ("\uff11\uff11", "11", True),
        (r"$\sqrt{4}$", "2", True), ("0.333333", "1/3", True), ("50%", "0.5", True), ("007", "7", True),
        ("-3", "3", False), ("11", "12", False), ("1.5", "15", False), ("1/3", "0.3", False), ("three", "3", False),
        ("teal", "red", False), ("", "3", False), ("It is 3, not 4", "3", False), ("x", "0", False),
    ],
)  # fmt: skip
def test_numbers_are_equal_however_they_are_written(equal_numbers, text: str, reference: str, same: bool) -> None:
    assert equal_numbers(text, reference) is same


@settings(deadline=None)
@given(numerators=st.tuples(*[st.integers(-200, 200)] * 2), denominators=st.tuples(*[st.integers(1, 12)] * 2))
def test_fractions_are_equal_as_fractions_are(equal_numbers, numerators, denominators) -> None:
    ours, theirs = (Fraction(n, d) for n, d in zip(numerators, denominators, strict=True))
    written = [f"{n}/{d}" for n, d in zip(numerators, denominators, strict=True)]
    assert equal_numbers(*written) == equal_numbers(*reversed(written)) == (ours == theirs)
    assert equal_numbers(f"The answer is {written[0]}.", str(ours))


@given(st.integers(0, 10**9))
@settings(deadline=None)
def test_thousands_may_be_marked(equal_numbers, value: int) -> None:
    assert equal_numbers(f"{value:,}", str(value)) and equal_numbers(f"{value}.0", f"{value:,}")


@pytest.mark.timeout(120)
def test_a_text_that_computes_without_end_is_unequal_after_seconds(equal_numbers) -> None:
    for text in ("9^9^9^9^9", "2^" * 400 + "2", "(" * 900, r"\sqrt{" * 150, "$" + "{" * 800 + "1", "[" * 5000 + "1"):
        assert not equal_numbers(text, "3")
    assert equal_numbers("3.0", "3")


def test_a_process_that_does_not_answer_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with number.number_comparison() as equal:
        assert equal("3.0", "3")
        with monkeypatch.context() as patch:
            patch.setattr(number, "PAIR_SECONDS", 0.0)
            assert not equal("9^9^9^9^9", "3")
        assert equal("3.0", "3")


def test_a_process_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(number, "WORKER", "masters.rewards.nothing")
    with number.number_comparison() as equal, pytest.raises(WorkerError, match="did not start"):
        equal("3.0", "3")


# verdicts


@pytest.mark.parametrize(("text", "score"), [("Blue!", 1.0), ("navy", 1.0), ("red", 0.0), ("", 0.0), ("   ", 0.0)])
def test_a_rule_always_gives_a_verdict(text: str, score: float) -> None:
    with open_verifier(Answers()) as checks:
        verdict = verifiers.make_verdict(checks, Triple("What color?", "blue", text, ("navy",)))
    assert (verdict.score, verdict.status) == (score, "ok")
    assert "against 'blue' or 'navy'" in verdict.explanation
    with pytest.raises(dataclasses.FrozenInstanceError):
        verdict.score = 1.0  # pyright: ignore[reportAttributeAccessIssue]


def test_identity_holds_only_the_rule_and_its_pattern() -> None:
    assert verifiers.verifier_identity(Answers()) == dict(verifier="rules-1")
    assert verifiers.verifier_identity(Answers(verifier="final", final_pattern="x")) == dict(
        verifier="final-1", final_pattern="x"
    )
