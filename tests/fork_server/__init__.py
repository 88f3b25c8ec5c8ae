"""Tests start engines, trainers and commands by forking one process that has imported their libraries."""

import json
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
PYTHON = str(Path(__file__).with_name("python"))  # stands in for the interpreter


def open_session() -> None:
    """Set the environment that the clients need; the first one starts the server. To be called once a session."""
    folder = tempfile.mkdtemp(prefix="fork-server-")
    os.environ["FORK_SERVER"], os.environ["FORK_SERVER_PYTHON"] = folder, sys.executable
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["MASTERS_PYTHON"] = PYTHON  # engines and trainers
    session = dict(python=sys.executable, root=str(ROOT), owner=os.getpid(), environment=dict(os.environ))
    Path(folder, "session.json").write_text(json.dumps(session))


def programs() -> set[int]:
    """Return the pids of the programs that run now, whoever started them."""
    mark, found = f"tests.fork_server.server {os.environ['FORK_SERVER']}/", set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if mark in " ".join(process.cmdline()):
                found.add(process.pid)
    return found


def close_session() -> None:
    shutil.rmtree(os.environ["FORK_SERVER"])
