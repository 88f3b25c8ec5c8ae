"""Ray for the time of a stage: one of our own on this machine, or a cluster that somebody else runs.

Our own listens on loopback alone, has no dashboard, asks every caller for a token that this process made, and ends with
this process whatever ends it: Ray's processes die with their parents, and what does not at once `guard` kills.
"""

import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from masters.common.errors import InputError, WorkerError

# what engines write goes into a log file; Ray's authors are told nothing
QUIET = {"RAY_COLOR_PREFIX": "0", "RAY_DEDUP_LOGS": "0", "RAY_USAGE_STATS_ENABLED": "0"}
LOOPBACK = "127.0.0.1"
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # else Ray goes by the machine's address, and listens on all
STORE_BYTES = 100 * 2**20  # of Ray's own store: only references and lists of questions travel


@contextmanager
def local(workers: int) -> Iterator[None]:
    """A Ray of our own with room for `workers` engines. Call before anything imports ray."""
    folder = tempfile.mkdtemp(prefix="masters-ray-")  # short: sockets lie in it
    guard = _guard(folder)
    try:
        os.environ |= QUIET | ON_LOOPBACK | {"RAY_AUTH_MODE": "token"}
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
        import ray

        ray.init(
            address="local", num_cpus=workers, include_dashboard=False, object_store_memory=STORE_BYTES,
            _node_ip_address=LOOPBACK, _temp_dir=folder,
        )  # fmt: skip
        signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))  # the guard ends what is left at once
        try:
            yield
        finally:
            ray.shutdown()
    finally:
        _release(guard)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def cluster(address: str) -> Iterator[None]:
    """The cluster whose head is at HOST:PORT. Its actors end with this process; nothing else of it is ours to end."""
    here = address.startswith(LOOPBACK)
    os.environ |= QUIET | (ON_LOOPBACK if here else {})  # read when Ray is imported
    import ray

    try:
        ray.init(address=address, _node_ip_address=LOOPBACK if here else None)
    except (ConnectionError, RuntimeError, ValueError) as error:  # not one of its nodes, another version, no token
        raise WorkerError(
            f"runtime.ray_address: Ray at {address} did not take this machine ({error}); it must be one of the "
            "cluster's nodes (`ray start --address=...`) with the same versions of Ray and Python"
        ) from error
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        ray.shutdown()


def room(gpus: int | None, tensor_parallel_size: int) -> tuple[int, int]:
    """GPUs of an engine (None: as many as it spreads a model over, where there are any), and engines that have room.

    Raises InputError if there is room for none.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    largest = max((int(node.get("GPU", 0)) for node in nodes), default=0)
    each = gpus if gpus is not None else tensor_parallel_size if largest else 0
    places = sum(int(min(of.get("CPU", 0), of.get("GPU", 0) // each if each else math.inf)) for of in nodes)
    if not places:
        raise InputError(
            f"an engine needs {each} GPUs and a CPU of one node (runtime.engine_gpus, runtime.tensor_parallel_size); "
            f"Ray has {len(nodes)} nodes, the largest with {largest} GPUs"
        )
    return each, places


def _guard(folder: str) -> subprocess.Popen:
    """Started while this process has its session for itself."""
    command = [sys.executable, "-m", "masters.execution.ray_engines.guard", folder]
    return subprocess.Popen(command, stdin=subprocess.PIPE)


def _release(guard: subprocess.Popen) -> None:
    """Have it end what is left of our Ray, and wait for it."""
    assert guard.stdin
    guard.stdin.close()
    guard.wait()
