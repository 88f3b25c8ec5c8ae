"""Verifier by exact match after normalization. Imports no torch."""

import re
import unicodedata

QUOTES = " \"'`()[]\u201c\u201d\u2018\u2019\u00ab\u00bb"  # quotes and brackets, removed from both ends
TRAILING = QUOTES + ".,!?;:"  # removed from the end only, since ".5" is not "5"


def normalize(text: str) -> str:
    """Apply NFKC and case folding, collapse white space, strip quotes, brackets and trailing punctuation."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"\s+", " ", folded).lstrip(QUOTES).rstrip(TRAILING)


def exact_match(text: str, reference: str) -> bool:
    """Return whether both are equal after `normalize`. A text that is empty after it matches nothing."""
    return bool(normalize(text)) and normalize(text) == normalize(reference)
