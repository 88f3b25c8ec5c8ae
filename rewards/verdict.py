"""What is judged, and a verdict on it.

ok              it was judged; an empty or a wrong text is judged 0
parse_failed    the judge answered, its score could not be read
refused         the judge does not take this prompt, as one too long for it
judge_failed    the judge could not be had; a later run asks it again
"""

from dataclasses import dataclass
from typing import Literal

from masters.common.hashing import canonical, digest

Status = Literal["ok", "parse_failed", "refused", "judge_failed"]
FINAL = ("ok", "parse_failed")  # what asking again would not change


@dataclass(frozen=True)
class Triple:
    """A text to be judged against the reference answer of its question. Equal triples share one verdict.

    `others`: further answers that are accepted instead of the reference.
    """

    question: str
    reference: str
    text: str
    others: tuple[str, ...] = ()

    @property
    def accepted(self) -> tuple[str, ...]:
        return (self.reference, *self.others)

    @property
    def digest(self) -> str:
        return digest(canonical(self.to_json() if self.others else self.to_json()[:3]).encode())

    def to_json(self) -> list:
        return [self.question, self.reference, self.text, list(self.others)]

    @classmethod
    def from_json(cls, parts: list) -> "Triple":
        question, reference, text, others = parts
        return cls(question, reference, text, tuple(others))


@dataclass(frozen=True)
class Verdict:
    """`score` in [0, 1], None exactly where the status is not "ok": a verdict that could not be had is never a 0."""

    score: float | None
    status: Status
    explanation: str = ""  # a judge's own words, or why there are none
    reading: str | None = None  # what its second, short call said
