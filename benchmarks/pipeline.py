"""Run the demo as a user does, for benchmarks of the whole: a fresh process of the command line, an empty store."""

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

    Returns the summary and wall seconds. Raises MastersError with the last line of its output.
    """
    settings = [part for key, value in values.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]
    start = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-m", "masters.cli", *command, str(CONFIG), *settings, "--json"],
        cwd=ROOT,  # the configuration's model folders are relative to it
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if process.returncode:
        last_line = process.stderr.strip().rpartition("\n")[2] or "no output"
        raise MastersError(f"the demo ended with exit code {process.returncode}: {last_line}")
    return json.loads(process.stdout.splitlines()[-1]), time.monotonic() - start


def read_stages(summary: dict) -> dict[str, dict]:
    """Return the summary's entries by stage name. Raises MastersError if a stage was reused instead of built."""
    reused = [stage["name"] for stage in summary["stages"] if stage["outcome"] != "built"]
    if reused:
        raise MastersError(f"expected an empty store, found {', '.join(reused)} built already")
    return {stage["name"]: stage for stage in summary["stages"]}
