"""R_acc by rule: exact match after a stated normalisation. Also the evaluation's metric. Imports no torch."""

import re
import unicodedata

from masters.rewards.verdict import Verdict

QUOTES = " \"'`()[]\u201c\u201d\u2018\u2019\u00ab\u00bb"  # and brackets: removed from both ends
TRAILING = QUOTES + ".,!?;:"  # removed from the end only: ".5" is not "5"


def normalise(text: str) -> str:
    """NFKC, case folded, white space collapsed, surrounding quotes and brackets and trailing punctuation removed."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"\s+", " ", folded).lstrip(QUOTES).rstrip(TRAILING)


def exact_match(text: str, reference: str) -> bool:
    """Whether both are equal after `normalise`. A text of nothing matches nothing."""
    return bool(normalise(text)) and normalise(text) == normalise(reference)


def rule_accuracy(question: str, reference: str, text: str) -> Verdict:
    """1 if the response is the reference answer, 0 otherwise. `question` is what every judge gets; unused here."""
    right = exact_match(text, reference)
    return Verdict(float(right), "ok", f"normalised {normalise(text)[:200]!r} against {normalise(reference)[:200]!r}")
