"""The demo as a user runs it, for benchmarks of the whole: a fresh process of the command line, an empty store."""

import json
import subprocess
import sys
import time
from pathlib import Path

from masters.common.errors import MastersError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs/easyvqa.toml"


def run(*command: str, **values: object) -> tuple[dict, float]:
    """Run `masters COMMAND configs/easyvqa.toml --set KEY=VALUE...` (`__` in a key stands for a dot).

    Returns its summary and wall seconds. Raises MastersError with what it said last.
    """
    settings = [part for key, value in values.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "masters.cli", *command, str(CONFIG), *settings, "--json"],
        cwd=ROOT,  # the demo names its models relative to it
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2] or "nothing"
        raise MastersError(f"the demo ended with exit code {done.returncode} and said: {said}")
    return json.loads(done.stdout.splitlines()[-1]), time.monotonic() - began


def stages(summary: dict) -> dict[str, dict]:
    """What the summary says of each stage, by name. Raises MastersError where one was not built but found."""
    reused = [stage["name"] for stage in summary["stages"] if stage["outcome"] != "built"]
    if reused:
        raise MastersError(f"expected an empty store, found {', '.join(reused)} built already")
    return {stage["name"]: stage for stage in summary["stages"]}
