"""Calls a function in a process of its own, forked from one that has imported vLLM: its memory comes back."""

import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tests.fork_server import PYTHON, ROOT

T = TypeVar("T")


def call_in_process(function: Callable[..., T], *arguments: object) -> T:
    """Return the function's result. Function and arguments are pickled; an error has what the process wrote."""
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "given"), Path(folder, "result")
        given.write_bytes(pickle.dumps((function, arguments)))
        command = [PYTHON, "-m", "tests.fork_server.call", str(given), str(result)]
        done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{function.__name__} ended with {done.returncode}: {done.stderr[-3000:]}")
        return pickle.loads(result.read_bytes())


def main(given: str, result: str) -> None:
    function, arguments = pickle.loads(Path(given).read_bytes())
    Path(result).write_bytes(pickle.dumps(function(*arguments)))


if __name__ == "__main__":
    main(*sys.argv[1:])
