"""The commit of the running code, where the code lies in a git checkout."""

import subprocess
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent


@cache
def code_commit() -> str | None:
    """Return the checked-out commit, with "-dirty" appended if tracked files differ; None outside a checkout."""
    # an installed package may lie inside another repository, which does not track this file
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(FOLDER), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
