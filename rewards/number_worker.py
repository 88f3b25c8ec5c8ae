"""The process that compares numbers: a line [text, reference] comes in, a line true or false goes out.

`python -m masters.rewards.number_worker`, started by `masters.rewards.number`. Its first line, null, says that it is
ready. Here math-verify is in the main thread of a process, so that its own time limits hold.
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

SECONDS = 2  # of math-verify, for a text and for each comparison
MEMORY = 4 << 30  # bytes of address space
FULL_STOP = re.compile(r"(?<=\d)\.(?!\d)")  # math-verify reads "1/3." as a decimal fraction, unequal to 1/3
MINUS = str.maketrans("\u2212\u2013", "--")  # the sign and the dash that stand for it


def main() -> None:
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of each time limit that was reached
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # whatever a library prints is no answer
    print("null", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(equal(*json.loads(line))), file=answers, flush=True)


def equal(text: str, reference: str) -> bool:
    """Whether the final numbers of two texts are equal, to six decimal places where one is a decimal fraction."""
    try:
        return verify(_parsed(reference), _parsed(text), timeout_seconds=SECONDS)
    except Exception:  # SymPy raises many kinds, on texts that nobody thought of
        return False


@lru_cache(maxsize=1024)
def _parsed(text: str) -> list:
    plain = FULL_STOP.sub("", unicodedata.normalize("NFKC", text).translate(MINUS))
    # without the texts themselves, which math-verify would compare where it finds no number
    return parse(plain, fallback_mode="no_fallback", parsing_timeout=SECONDS)


if __name__ == "__main__":
    main()
