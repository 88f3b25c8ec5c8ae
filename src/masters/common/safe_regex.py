"""Patterns that a user writes, matched in time linear in the text: whoever fills in a form cannot hang a run.

RE2's language: regular expressions without look-around and back references, which are what can take for ever.
"""

from collections import deque
from functools import lru_cache

import re2

LONGEST = 1000  # characters: time is linear in them too
MEMORY = 1 << 20  # bytes of a compiled pattern: repetitions of repetitions are short to write
SHOWN = 100  # characters of a pattern at fault


def checked(pattern: str) -> str:
    """The pattern. Raises ValueError, with what is wrong, if it is none."""
    if len(pattern) > LONGEST:
        raise ValueError(f"expected at most {LONGEST} characters, found {len(pattern)}: {pattern!r:.{SHOWN}}")
    try:
        _compiled(pattern)
    except (re2.error, UnicodeEncodeError) as error:
        said = error.args[0].decode(errors="replace") if isinstance(error, re2.error) else "not valid Unicode"
        raise ValueError(f"{pattern!r:.{SHOWN}} is no regular expression ({said:.{SHOWN}}); see RE2's syntax") from None
    return pattern


def found(pattern: str, text: str) -> bool:
    """Whether a pattern matches anywhere in a text."""
    return _compiled(pattern).search(text) is not None


def last(pattern: str, text: str) -> str | None:
    """The first group of a pattern's last match in a text, None without a match.

    Of a pattern without groups, and where the group took no part, it is the whole match.
    """
    plain = text.encode(errors="replace").decode()  # RE2 takes no lone surrogates
    matches = deque(_compiled(pattern).finditer(plain), maxlen=1)
    return next((match[0] if match.lastindex is None or match[1] is None else match[1] for match in matches), None)


@lru_cache(maxsize=256)
def _compiled(pattern: str):
    options = re2.Options()
    options.log_errors = False
    options.max_mem = MEMORY
    return re2.compile(pattern, options)
