"""What an actor on Ray is: one engine, started once, that does one piece after another and commits each itself.

Imported by Ray's workers and by the driver; the libraries that an engine needs are imported when it starts.
"""

import importlib
import os
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from masters import memory
from masters.errors import InputError
from masters.processes import LOOPBACK, die_with_parent
from masters.secrets import mask_logs

ALIKE = ("masters", "torch", "transformers")  # what a node must have as the driver does: rows depend on it


def versions() -> dict[str, str]:
    """Of what rows depend on."""
    return {name: version(name) for name in ALIKE}


class EngineActor:
    """Its engine is opened by `start`, not by the constructor: what fails there is an error, not a death."""

    def __init__(self) -> None:
        die_with_parent(os.getppid())  # Ray's own watch over its workers takes longer
        mask_logs()
        self._open, self._worker = ExitStack(), None

    def start(self, work: dict, expected: dict[str, str] | None) -> int:
        """Open the engine; returns the process id. `expected`: versions, on a cluster, where the model is checked too.

        Raises InputError if this node has other libraries than the driver or another model at the same path.
        """
        if expected:
            _check_node(work, expected)
        os.environ.update(LOOPBACK)  # of what the engine's own processes open to find each other
        module: Any = importlib.import_module(work["module"])
        self._worker = self._open.enter_context(module.opened(work["setup"]))
        return os.getpid()

    def do(self, piece: dict) -> tuple[dict, float]:
        """The piece's line of progress and this process's peak of memory so far, in MiB."""
        assert self._worker, "start comes first"
        return self._worker.do(piece), memory.peak_mib()


def _check_node(work: dict, expected: dict[str, str]) -> None:
    from masters.models.checkpoints import model_digest

    node = os.uname().nodename
    if (found := versions()) != expected:
        raise InputError(f"Ray node {node} has {found}, the driver has {expected}: nodes must have the same versions")
    folder = Path(work["folder"])
    if not folder.is_dir():
        raise InputError(f"Ray node {node} has no folder {folder}: models must lie at the same path on every node")
    if model_digest(folder) != work["digest"]:
        raise InputError(f"Ray node {node} has another model in {folder} than this machine")
