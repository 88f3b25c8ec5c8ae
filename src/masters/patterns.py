"""Patterns that a user writes, matched in time linear in the text: whoever fills in a form cannot hang a run.

RE2's language: regular expressions without look-around and back references, which are what can take for ever.
"""

from functools import lru_cache

import re2

SHOWN = 100  # characters of a pattern at fault


def check(pattern: str) -> None:
    """Raises ValueError, with what is wrong, if a pattern is none."""
    try:
        _compiled(pattern)
    except (re2.error, UnicodeEncodeError) as error:
        said = error.args[0].decode(errors="replace") if isinstance(error, re2.error) else "not valid Unicode"
        raise ValueError(f"{pattern!r:.{SHOWN}} is no regular expression ({said:.{SHOWN}}); see RE2's syntax") from None


def found(pattern: str, text: str) -> bool:
    """Whether a pattern matches anywhere in a text."""
    return _compiled(pattern).search(text) is not None


@lru_cache(maxsize=256)
def _compiled(pattern: str):
    options = re2.Options()
    options.log_errors = False
    return re2.compile(pattern, options)
