"""A verdict on one response.

ok              it was judged; an empty or a wrong text is judged 0
parse_failed    the judge answered, its score could not be read
judge_failed    the judge could not be had
"""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "parse_failed", "judge_failed"]


@dataclass(frozen=True)
class Verdict:
    """`score` in [0, 1], None exactly where the status is not "ok": a verdict that could not be had is never a 0."""

    score: float | None
    status: Status
    explanation: str = ""
