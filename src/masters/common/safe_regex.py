"""Regular expressions from users, matched in time linear in the text, so that no pattern can hang a run.

The syntax is RE2's: look-around and back references, which can take exponential time, are refused.
"""

from collections import deque
from functools import lru_cache

import re2

MAX_PATTERN_LENGTH = 1000  # characters; time is linear in them too
MAX_COMPILED_BYTES = 1 << 20  # nested repetitions are short to write and large when compiled
SHOWN_LENGTH = 100  # characters of a pattern in an error message


def check_pattern(pattern: str) -> str:
    """Return the pattern. Raises ValueError if it is too long or not a regular expression."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise ValueError(
            f"expected at most {MAX_PATTERN_LENGTH} characters, found {len(pattern)}: {pattern!r:.{SHOWN_LENGTH}}"
        )
    try:
        _compile(pattern)
    except (re2.error, UnicodeEncodeError) as error:
        reason = error.args[0].decode(errors="replace") if isinstance(error, re2.error) else "not valid Unicode"
        raise ValueError(
            f"{pattern!r:.{SHOWN_LENGTH}} is not a regular expression ({reason:.{SHOWN_LENGTH}}); see RE2's syntax"
        ) from None
    return pattern


def matches(pattern: str, text: str) -> bool:
    """Return whether the pattern matches anywhere in the text."""
    return _compile(pattern).search(text) is not None


def last_match(pattern: str, text: str) -> str | None:
    """Return the first group of the last match in the text, None without a match.

    If the pattern has no group, or the group did not take part in the match, return the whole match.
    """
    plain = text.encode(errors="replace").decode()  # RE2 takes no lone surrogates
    matches = deque(_compile(pattern).finditer(plain), maxlen=1)
    return next((match[0] if match.lastindex is None or match[1] is None else match[1] for match in matches), None)


@lru_cache(maxsize=256)
def _compile(pattern: str):
    options = re2.Options()
    options.log_errors = False
    options.max_mem = MAX_COMPILED_BYTES
    return re2.compile(pattern, options)
