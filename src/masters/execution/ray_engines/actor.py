"""What an actor on Ray is: one engine, started once, that does one piece after another and commits each itself.

Imported by Ray's workers and by the driver; the libraries that an engine needs are imported when it starts.
"""

import importlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from masters.common import machine
from masters.common.errors import InputError
from masters.common.hashing import model_digest
from masters.common.redaction import redact_logs
from masters.execution.processes import LOOPBACK, SLOT, die_with_parent
from masters.store.storage import Storage

PINNED = ("masters", "vllm", "torch", "transformers")  # rows depend on them


@dataclass(frozen=True)
class NodeRequirements:
    """What every node of a cluster must have as the driver's has it: versions, and the store with this object."""

    versions: dict[str, str]
    seen: str


@contextmanager
def alike(store: str) -> Iterator[NodeRequirements]:
    """What nodes are held to while a driver runs."""
    name, storage = f".ray-{uuid.uuid4().hex}", Storage(store)
    storage.create(name, b"")
    try:
        yield NodeRequirements(_versions(), name)
    finally:
        storage.remove(name)


def _versions() -> dict[str, str]:
    names = packages_distributions()  # vLLM's wheel for CPUs has a name of its own
    return {name: version(name) for package in PINNED for name in names[package]}


class EngineActor:
    """Its engine is opened by `start`, not by the constructor: what fails there is an error, not a death."""

    def __init__(self) -> None:
        die_with_parent(os.getppid())  # Ray's own watch over its workers takes longer
        redact_logs()
        self._worker: Any = None

    def start(self, work: dict, expected: NodeRequirements | None) -> int:
        """Open the engine; returns the process id. `expected`: of a cluster's node, whose model is checked too.

        Raises InputError if this node has other libraries than the driver, another store or another model at the path.
        """
        if expected:
            _check_node(work, expected)
        os.environ.pop(SLOT, None)  # the driver's; Ray chose this process's devices
        os.environ.update(LOOPBACK)  # of what the engine's own processes open to find each other
        module: Any = importlib.import_module(work["module"])
        self._worker = module.opened(work["setup"])
        return os.getpid()

    def do(self, piece: dict) -> tuple[dict, float]:
        """The piece's line of progress and this process's peak of memory so far, in MiB."""
        assert self._worker, "start comes first"
        return self._worker.do(piece), machine.peak_mib()


def _check_node(work: dict, expected: NodeRequirements) -> None:
    node = os.uname().nodename
    if (found := _versions()) != expected.versions:
        raise InputError(f"Ray node {node} has {found}, the driver {expected.versions}: versions must be the same")
    if not Storage(store := work["setup"]["store"]).exists(expected.seen):
        raise InputError(f"Ray node {node} does not see this machine's store {store}: use S3 or a folder of all nodes")
    folder = Path(work["folder"])
    if not folder.is_dir():
        raise InputError(f"Ray node {node} has no folder {folder}: models must lie at the same path on every node")
    if model_digest(folder) != work["digest"]:
        raise InputError(f"Ray node {node} has another model in {folder} than this machine")
