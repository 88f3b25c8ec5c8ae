"""A Ray cluster for tests, as somebody else runs it: one node on loopback, at random ports."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from masters.execution.ray_engines.guard import session_processes
from masters.infra.ports import free_ports
from tests.local_stack import until

ROOT = Path(__file__).parents[1]
HOST = "127.0.0.1"
ENGINE_TITLE = "ray::EngineActor"  # what Ray calls an engine's process


@dataclass(frozen=True)
class Cluster:
    address: str
    head: int  # its process

    def engines(self) -> set[int]:
        """Return the processes of actors that hold, or start, an engine."""
        return {pid for pid in session_processes(self.head) if _title(pid).startswith(ENGINE_TITLE)}


@contextmanager
def serve(folder: Path) -> Iterator[Cluster]:
    """`folder`: a short name, as Ray's sockets lie in it."""
    port, *others = free_ports(4)
    names = ("ray-client-server-port", "dashboard-port", "dashboard-agent-listen-port")
    ports = [f"--{name}={other}" for name, other in zip(names, others, strict=True)]
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--node-ip-address={HOST}",
        f"--port={port}", *ports, "--include-dashboard=false", "--num-cpus=2", f"--temp-dir={folder}",
    ]  # fmt: skip
    # the last: the stand-in for an engine is one of the tests' modules
    settings = dict(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_USAGE_STATS_ENABLED="0", PYTHONPATH=str(ROOT))
    with open(folder / "head.log", "wb") as log:
        head = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log, start_new_session=True)

    def started() -> bool:
        said = (folder / "head.log").read_bytes()
        assert head.poll() is None, said.decode(errors="replace")[-3000:]
        return b"runtime started" in said

    try:
        until(started, "the cluster's head")
        yield Cluster(f"{HOST}:{port}", head.pid)
    finally:
        for pid in session_processes(head.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        head.wait()


def _title(pid: int) -> str:
    with suppress(psutil.Error):
        return " ".join(psutil.Process(pid).cmdline())
    return ""
