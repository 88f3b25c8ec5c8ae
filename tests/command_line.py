"""The command line as a user types it, in a process of its own."""

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as parquet

from tests.fork_server import PYTHON

ROOT = Path(__file__).parents[1]
SOUND = ROOT / ".venv/sound"


def share_notes(home: Path) -> None:
    """Share the notes on sound models between homes: checking takes a process 8 s of CPU, mostly imports."""
    notes = home / ".cache/masters/sound"
    SOUND.mkdir(exist_ok=True)
    with suppress(OSError):  # a test put something in the way
        notes.parent.mkdir(parents=True, exist_ok=True)
        notes.symlink_to(SOUND)


def environment(home: Path, **variables: str) -> dict[str, str]:
    """Return the environment of a user with this home who has set nothing but `variables`."""
    share_notes(home)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "AWS_", "MASTERS_"))}
    return kept | {"HOME": str(home), "MASTERS_PYTHON": PYTHON} | variables


def options(values: dict[str, object]) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def masters(*arguments: str, home: Path, here: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    """Run `masters` to its end in the folder `here`."""
    command = [PYTHON, "-m", "masters.cli", *arguments]
    given = environment(home, **variables)
    return subprocess.run(command, cwd=here, env=given, capture_output=True, text=True, timeout=1200)


def read_json(done: subprocess.CompletedProcess) -> dict:
    """Return the JSON that a successful command printed with --json."""
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def rows(summary: dict, stage: str, table: str) -> list[dict]:
    """Return the rows of a stage's table, from the files that the artifact's record lists."""
    folder = Path(next(s["uri"] for s in summary["stages"] if s["name"] == stage))
    listed = [file["name"] for file in json.loads((folder / "record.json").read_text())["files"]]
    return [r for n in listed if n.startswith(f"{table}/") for r in parquet.read_table(folder / n).to_pylist()]
