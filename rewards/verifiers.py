"""The registry of verifiers: rules by which an answer is right (`answers.verifier`). Imports no torch.

Each accepts whatever `exact_match` accepts, and an answer is right that matches any of its question's accepted ones.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

from masters.config import Answers
from masters.rewards.choice import same_choice
from masters.rewards.final_answer import same_final_answer
from masters.rewards.number import comparing_numbers
from masters.rewards.rules import exact_match, normalize
from masters.rewards.verdict import Triple, Verdict

SHOWN = 200  # characters of a text in an explanation

Check = Callable[[str, str], bool]  # whether a text says what a reference answer says
AnyOf = Callable[[str, Sequence[str]], bool]  # the same of any of several


@dataclass(frozen=True)
class Verifier:
    """A rule. `label`: its name and version in verdicts and in identities; `metric`: what accuracy by it is called."""

    label: str
    metric: str
    opened: Callable[[Answers], AbstractContextManager[Check]]


VERIFIERS: dict[str, Verifier] = {
    "exact": Verifier("rules-1", "exact match", lambda _: nullcontext(exact_match)),
    "final": Verifier(
        "final-1", "exact match of the final answer",
        lambda answers: nullcontext(partial(same_final_answer, pattern=answers.final_pattern)),
    ),
    "number": Verifier("number-1", "numeric equality", lambda _: comparing_numbers()),
    "choice": Verifier("choice-1", "match of the chosen letter", lambda _: nullcontext(same_choice)),
}  # fmt: skip


def verifier_of(answers: Answers) -> Verifier:
    return VERIFIERS[answers.verifier]


def identity(answers: Answers) -> dict:
    """What decides whether an answer is right, for an artifact's identity."""
    return dict(verifier=verifier_of(answers).label, **answers.model_dump(include={"final_pattern"}, exclude_none=True))


@contextmanager
def verifying(answers: Answers) -> Iterator[AnyOf]:
    """A function that says whether a text matches any of the accepted answers. It never raises on a text's account."""
    with verifier_of(answers).opened(answers) as same:
        yield lambda text, accepted: any(exact_match(text, one) or same(text, one) for one in accepted)


def verdict(is_right: AnyOf, triple: Triple) -> Verdict:
    """1 if the text matches any accepted answer, 0 otherwise."""
    accepted = " or ".join(repr(normalize(one)[:SHOWN]) for one in triple.accepted)
    told = f"normalized {normalize(triple.text)[:SHOWN]!r} against {accepted}"
    return Verdict(float(is_right(triple.text, triple.accepted)), "ok", told)
