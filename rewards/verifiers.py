"""Verifiers: rules that decide whether an answer is right (`answers.verifier`). Imports no torch.

Each verifier accepts every text that `exact_match` accepts. An answer is right if it matches any accepted answer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

from masters.config import Answers
from masters.rewards.choice import is_same_choice
from masters.rewards.final_answer import is_same_final_answer
from masters.rewards.number import number_comparison
from masters.rewards.rules import exact_match, normalize
from masters.rewards.verdict import Triple, Verdict

MAX_SHOWN = 200  # characters of a text in an explanation

IsSame = Callable[[str, str], bool]  # (text, reference answer)
IsRight = Callable[[str, Sequence[str]], bool]  # (text, accepted answers)


@dataclass(frozen=True)
class Verifier:
    """A rule. `label`: its name and version in verdicts and identities; `metric`: the name of accuracy by this rule."""

    label: str
    metric: str
    open: Callable[[Answers], AbstractContextManager[IsSame]]


VERIFIERS: dict[str, Verifier] = {
    "exact": Verifier("rules-1", "exact match", lambda _: nullcontext(exact_match)),
    "final": Verifier(
        "final-1",
        "exact match of the final answer",
        lambda answers: nullcontext(partial(is_same_final_answer, pattern=answers.final_pattern)),
    ),
    "number": Verifier("number-1", "numeric equality", lambda _: number_comparison()),
    "choice": Verifier("choice-1", "match of the chosen letter", lambda _: nullcontext(is_same_choice)),
}


def get_verifier(answers: Answers) -> Verifier:
    return VERIFIERS[answers.verifier]


def verifier_identity(answers: Answers) -> dict:
    """Return the settings that decide whether an answer is right, for an artifact's identity."""
    pattern = answers.model_dump(include={"final_pattern"}, exclude_none=True)
    return dict(verifier=get_verifier(answers).label, **pattern)


@contextmanager
def open_verifier(answers: Answers) -> Iterator[IsRight]:
    """Yield a function that returns whether a text matches any accepted answer. No text makes it raise."""
    with get_verifier(answers).open(answers) as is_same:
        yield lambda text, accepted: any(exact_match(text, answer) or is_same(text, answer) for answer in accepted)


def make_verdict(is_right: IsRight, triple: Triple) -> Verdict:
    """Score 1 if the text matches any accepted answer, else 0."""
    accepted = " or ".join(repr(normalize(answer)[:MAX_SHOWN]) for answer in triple.accepted)
    explanation = f"normalized {normalize(triple.text)[:MAX_SHOWN]!r} against {accepted}"
    return Verdict(float(is_right(triple.text, triple.accepted)), "ok", explanation)
