"""What is judged, and a verdict on it.

ok              it was judged; an empty or a wrong text is judged 0
parse_failed    the judge answered, its score could not be read
refused         the judge does not take this prompt, as one too long for it
judge_failed    the judge could not be had; a later run asks it again
"""

from dataclasses import dataclass
from typing import Literal

from masters.identity import canonical, digest

Status = Literal["ok", "parse_failed", "refused", "judge_failed"]
FINAL = ("ok", "parse_failed")  # what asking again would not change


@dataclass(frozen=True)
class Triple:
    """A text to be judged against the reference answer of its question. Equal triples share one verdict."""

    question: str
    reference: str
    text: str

    @property
    def digest(self) -> str:
        return digest(canonical([self.question, self.reference, self.text]).encode())


@dataclass(frozen=True)
class Verdict:
    """`score` in [0, 1], None exactly where the status is not "ok": a verdict that could not be had is never a 0."""

    score: float | None
    status: Status
    explanation: str = ""  # a judge's own words, or why there are none
    reading: str | None = None  # what its second, short call said
