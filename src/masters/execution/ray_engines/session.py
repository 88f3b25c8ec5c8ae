"""Use Ray for the time of a stage: a local one, started on this machine, or a cluster that somebody else runs.

A local Ray listens on loopback alone, has no dashboard, asks callers for a token, and ends with this process in every
case: Ray's processes die with their parents, and `guard` kills those that do not do so at once.
"""

import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from masters.common.errors import InputError, WorkerError
from masters.execution.processes import WorkerModule
from masters.execution.ray_engines import ray_compat


@contextmanager
def local_ray(workers: int) -> Iterator[None]:
    """Start a local Ray with room for `workers` engines. Call before anything imports ray."""
    folder = tempfile.mkdtemp(prefix="masters-ray-")  # short: sockets lie in it
    guard = _start_guard(folder)
    try:
        ray_compat.start_local(workers, folder)
        # the guard ends what is left at once
        signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
        try:
            yield
        finally:
            _shut_down()
    finally:
        _release_guard(guard)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ray_cluster(address: str) -> Iterator[None]:
    """Connect to the cluster whose head is at HOST:PORT. Only the actors of this process end with it."""
    try:
        ray_compat.connect(address)
    except (ConnectionError, RuntimeError, ValueError) as error:  # not a node of it, another version, no token
        raise WorkerError(
            f"runtime.ray_address: Ray at {address} did not take this machine ({error}); it must be one of the "
            "cluster's nodes (`ray start --address=...`) with the same versions of Ray and Python"
        ) from error
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        _shut_down()


def find_capacity(engine_gpus: int | None, tensor_parallel_size: int) -> tuple[int, int]:
    """Return the GPUs of each engine and the number of engines that the nodes have room for.

    `engine_gpus` None: as many GPUs as an engine spreads its model over, none where no node has any. Raises
    InputError if there is room for no engine.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most_gpus = max((int(node.get("GPU", 0)) for node in nodes), default=0)
    gpus = engine_gpus if engine_gpus is not None else tensor_parallel_size if most_gpus else 0
    engines = sum(int(min(node.get("CPU", 0), node.get("GPU", 0) // gpus if gpus else math.inf)) for node in nodes)
    if not engines:
        raise InputError(
            f"an engine needs {gpus} GPUs and a CPU of one node (runtime.engine_gpus, runtime.tensor_parallel_size); "
            f"Ray has {len(nodes)} nodes, the largest with {most_gpus} GPUs"
        )
    return gpus, engines


def _shut_down() -> None:
    import ray

    ray.shutdown()


def _start_guard(folder: str) -> subprocess.Popen:
    """Start the guard while no other process is in this process's session."""
    return subprocess.Popen([sys.executable, "-m", WorkerModule.RAY_GUARD, folder], stdin=subprocess.PIPE)


def _release_guard(guard: subprocess.Popen) -> None:
    """Have the guard end what is left of the local Ray, and wait for it."""
    assert guard.stdin
    guard.stdin.close()
    guard.wait()
