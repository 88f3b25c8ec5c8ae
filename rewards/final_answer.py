"""The final part of an answer, which may come after steps. Imports no torch."""

import re

from masters.common import safe_regex
from masters.rewards.rules import exact_match, normalize

LONGEST = 10_000  # characters from the end that a pattern is looked for in: all its matches may take their square
BOXED = "\\boxed{"
MARKER = re.compile(
    r"####"
    r"|(?<![<>!=])=+>?"  # also "=>"; no inequality: "x <= 5" and "x >= 5" are not the same
    r"|(?<=[^\s\d]) ?:|(?<=\d):(?=\s)"  # no clock and no ratio: "12:30" and "11:30" are not the same
    r"|\banswer is\b"
)


def same_final_answer(text: str, reference: str, pattern: str | None = None) -> bool:
    """Whether a text's and a reference answer's final parts are equal after `normalize`.

    `pattern`: finds the final part of both in place of the markers; see `patterns.last`. An answer without a match, as
    one without a marker, is its own final part.
    """
    ours, theirs = (_found(pattern, one) if pattern else final_part(one) for one in (text, reference))
    return exact_match(ours, theirs)


def final_part(text: str) -> str:
    r"""The normalized final part of an answer, all of it if it has no marker or nothing stands after the last one.

    Markers, in any case: `\boxed{}`, whose content it is, else what stands after the last of "####", "=" (not of an
    inequality), ":" (not within a time or a ratio) and "answer is".
    """
    whole = normalize(text)
    part = _content(whole) if BOXED in whole else whole
    ends = [marker.end() for marker in MARKER.finditer(part)]
    return normalize(part[ends[-1] :] if ends else part) or whole


def _content(text: str) -> str:
    """What stands in the last box, up to its closing brace or the end."""
    content, depth = text.rpartition(BOXED)[2], 1
    for place, character in enumerate(content):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return content[:place]
    return content


def _found(pattern: str, text: str) -> str:
    part = safe_regex.last(pattern, text[-LONGEST:])
    return text if part is None else part
