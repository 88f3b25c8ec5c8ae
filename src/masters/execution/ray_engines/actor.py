"""An actor on Ray: one engine, started once, that does one piece after another and commits each itself.

Ray's workers and the driver import this module; the libraries that an engine needs are imported when it starts.
"""

import importlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from typing import Any

from masters.common import machine
from masters.common.errors import InputError
from masters.common.hashing import model_digest
from masters.common.redaction import redact_logs
from masters.execution.child_process import die_with_parent
from masters.execution.engines import EnginePiece, EngineWork
from masters.execution.events import EngineEvent
from masters.execution.processes import LOOPBACK, SLOT
from masters.store.storage import Storage

PINNED = ("masters", "vllm", "torch", "transformers")  # tables depend on their versions


@dataclass(frozen=True)
class NodeRequirements:
    """Package versions, and the store with `marker` in it, that every node of a cluster must share with the driver."""

    versions: dict[str, str]
    marker: str


@contextmanager
def node_requirements(store: str) -> Iterator[NodeRequirements]:
    """Put a marker into the store while a driver runs, and return what nodes must meet."""
    marker, storage = f".ray-{uuid.uuid4().hex}", Storage(store)
    storage.create(marker, b"")
    try:
        yield NodeRequirements(_installed_versions(), marker)
    finally:
        storage.remove(marker)


def _installed_versions() -> dict[str, str]:
    distributions = packages_distributions()  # vLLM's wheel for CPUs has its own name
    return {name: version(name) for package in PINNED for name in distributions[package]}


class EngineActor:
    """Runs an engine. `start` opens it, not the constructor: a failure there is an error, not the actor's death."""

    def __init__(self) -> None:
        die_with_parent(os.getppid())  # Ray's own watch over its workers takes longer
        redact_logs()
        self._worker: Any = None

    def start(self, work: EngineWork, requirements: NodeRequirements | None) -> int:
        """Open the engine; returns the process id. With `requirements`, check this node of a cluster first.

        Raises InputError if the node has other packages than the driver, another store, or another model at the path.
        """
        if requirements:
            _check_node(work, requirements)
        os.environ.pop(SLOT, None)  # the driver's; Ray chose this process's devices
        os.environ.update(LOOPBACK)  # for the sockets between the engine's own processes
        worker_class = importlib.import_module(work.module).Worker
        self._worker = worker_class(worker_class.Setup(**work.setup.model_dump()))
        return os.getpid()

    def do(self, piece: EnginePiece) -> tuple[EngineEvent, float]:
        """Do a piece; returns its event and this process's peak memory so far, in MiB."""
        assert self._worker, "start comes first"
        return self._worker.do(self._worker.Piece(**piece.model_dump())), machine.peak_memory_mib()


def _check_node(work: EngineWork, requirements: NodeRequirements) -> None:
    node, store = os.uname().nodename, work.setup.store
    if (found := _installed_versions()) != requirements.versions:
        raise InputError(f"Ray node {node} has {found}, the driver {requirements.versions}: versions must be the same")
    if not Storage(store).exists(requirements.marker):
        raise InputError(f"Ray node {node} does not see this machine's store {store}: use S3 or a folder of all nodes")
    if not work.folder.is_dir():
        raise InputError(f"Ray node {node} has no folder {work.folder}: models must lie at the same path on every node")
    if model_digest(work.folder) != work.digest:
        raise InputError(f"Ray node {node} has another model in {work.folder} than this machine")
