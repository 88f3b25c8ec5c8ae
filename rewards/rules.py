"""Exact match after a stated normalization. Imports no torch."""

import re
import unicodedata

QUOTES = " \"'`()[]\u201c\u201d\u2018\u2019\u00ab\u00bb"  # and brackets: removed from both ends
TRAILING = QUOTES + ".,!?;:"  # removed from the end only: ".5" is not "5"


def normalize(text: str) -> str:
    """NFKC, case folded, white space collapsed, surrounding quotes and brackets and trailing punctuation removed."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"\s+", " ", folded).lstrip(QUOTES).rstrip(TRAILING)


def exact_match(text: str, reference: str) -> bool:
    """Whether both are equal after `normalize`. A text of nothing matches nothing."""
    return bool(normalize(text)) and normalize(text) == normalize(reference)
