"""R_acc by rule: exact match after a stated normalisation. Also the evaluation's metric. Imports no torch."""

import re
import unicodedata

from masters.rewards.verdict import Verdict

EDGES = " .,!?;:\"'`()[]"


def normalise(text: str) -> str:
    """Unicode NFKC, case folded, white space collapsed, surrounding quotes, brackets and punctuation removed."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"\s+", " ", folded).strip(EDGES)


def exact_match(text: str, reference: str) -> bool:
    """Whether both are equal after `normalise`. A text of nothing matches nothing."""
    return bool(normalise(text)) and normalise(text) == normalise(reference)


def rule_accuracy(question: str, reference: str, text: str) -> Verdict:
    """1 if the response is the reference answer, 0 otherwise. `question` is what every judge gets; unused here."""
    right = exact_match(text, reference)
    return Verdict(float(right), "ok", f"normalised {normalise(text)[:200]!r} against {normalise(reference)[:200]!r}")
