"""Verifier for answers with steps: compares only the final part. Imports no torch."""

import re

from masters.common import safe_regex
from masters.rewards.rules import exact_match, normalize

MAX_SEARCHED = (
    10_000  # characters from the end that a pattern is searched in: finding all matches may take quadratic time
)
BOXED = "\\boxed{"
MARKER = re.compile(
    r"####"
    r"|(?<![<>!=])=+>?"  # also "=>"; no inequality: "x <= 5" and "x >= 5" are not the same
    r"|(?<=[^\s\d]) ?:|(?<=\d):(?=\s)"  # no clock and no ratio: "12:30" and "11:30" are not the same
    r"|\banswer is\b"
)


def is_same_final_answer(text: str, reference: str, pattern: str | None = None) -> bool:
    """Return whether the final parts of a text and of a reference answer are equal after `normalize`.

    `pattern`: finds the final part of both instead of the markers; see `safe_regex.last_match`. A text without a match,
    or without a marker, counts as a whole.
    """
    final_text, final_reference = (
        _last_match(pattern, answer) if pattern else final_part(answer) for answer in (text, reference)
    )
    return exact_match(final_text, final_reference)


def final_part(text: str) -> str:
    r"""Return the normalized final part of an answer; all of it without a marker or with nothing after the last one.

    Markers, in any case: `\boxed{}`, whose content is the final part, else the last of "####", "=" (not of an
    inequality), ":" (not within a time or a ratio) and "answer is", which the final part follows.
    """
    normalized = normalize(text)
    part = _last_box(normalized) if BOXED in normalized else normalized
    marker_ends = [marker.end() for marker in MARKER.finditer(part)]
    return normalize(part[marker_ends[-1] :] if marker_ends else part) or normalized


def _last_box(text: str) -> str:
    """Return the content of the last box, up to its closing brace or the end of the text."""
    content, depth = text.rpartition(BOXED)[2], 1
    for index, character in enumerate(content):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return content[:index]
    return content


def _last_match(pattern: str, text: str) -> str:
    match = safe_regex.last_match(pattern, text[-MAX_SEARCHED:])
    return text if match is None else match
