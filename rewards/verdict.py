"""The texts to be judged and the verdicts on them.

ok              the text was judged; an empty or a wrong text is judged 0
parse_failed    the judge answered, but its score could not be read
refused         the judge does not accept this prompt, for example one that is too long
judge_failed    the judge could not be reached; a later run asks it again
"""

from dataclasses import dataclass
from typing import Literal

from masters.common.hashing import canonical_json, digest

Status = Literal["ok", "parse_failed", "refused", "judge_failed"]
RIGHT = 0.5  # score from which a response counts as right
FINAL_STATUSES = ("ok", "parse_failed")  # asking the judge again would not change these


@dataclass(frozen=True)
class Triple:
    """A question, its reference answer and a text to be judged. Equal triples share one verdict.

    `others`: further accepted answers beside the reference.
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
        others = [list(self.others)] if self.others else []
        return digest(canonical_json([self.question, self.reference, self.text, *others]).encode())


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict on a text.

    `score` lies in [0, 1]; it is None exactly if the status is not "ok": a missing verdict never counts as 0.
    """

    score: float | None
    status: Status
    explanation: str = ""  # the judge's own words, or the reason why there are none
    reading: str | None = None  # the judge's second, short reply
