"""The process that compares numbers: reads a line [text, reference], writes a line true or false.

`python -m masters.rewards.number_worker`, started by `masters.rewards.number`. Its first line, null, means that it is
ready. math-verify runs in the main thread of this process, so that its own time limits work.
"""

import json
import logging
import os
import re
import resource
import sys
import unicodedata
from functools import lru_cache

from math_verify import parse, verify

TIMEOUT_SECONDS = 2  # of math-verify, to parse a text and for each comparison
MAX_MEMORY = 4 << 30  # bytes of address space
FULL_STOP = re.compile(r"(?<=\d)\.(?!\d)")  # math-verify reads "1/3." as a decimal fraction, unequal to 1/3
MINUS = str.maketrans("\u2212\u2013", "--")  # minus sign and en dash, to "-"


def main() -> None:
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it logs a warning for each time limit reached
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # what a library prints must not be read as an answer
    print("null", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(equal(*json.loads(line))), file=answers, flush=True)


def equal(text: str, reference: str) -> bool:
    """Return whether the final numbers of two texts are equal, to six places where one is a decimal fraction."""
    try:
        return verify(_parse(reference), _parse(text), timeout_seconds=TIMEOUT_SECONDS)
    except Exception:  # SymPy raises many kinds, on unforeseen texts
        return False


@lru_cache(maxsize=1024)
def _parse(text: str) -> list:
    plain = FULL_STOP.sub("", unicodedata.normalize("NFKC", text).translate(MINUS))
    # no fallback: math-verify would compare the texts themselves where it finds no number
    return parse(plain, fallback_mode="no_fallback", parsing_timeout=TIMEOUT_SECONDS)


if __name__ == "__main__":
    main()
