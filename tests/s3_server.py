"""A real S3 server for tests: SeaweedFS on loopback and free ports, its data in a folder, ended by its own pid."""

import ctypes
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from masters.infra import object_store

BUCKET = "lake"
START_SECONDS = 60
ACTIONS = {"owner": ["Admin", "Read", "Write", "List", "Tagging"], "reader": ["Read", "List"]}


@dataclass(frozen=True)
class S3:
    """A running server."""

    url: str
    pid: int

    def environment(self, user: str = "owner") -> dict[str, str]:
        """Return the variables to reach the server as `user`: "owner" may do everything, "reader" may not write."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": user,
            "AWS_SECRET_ACCESS_KEY": secret(user),
            "AWS_DEFAULT_REGION": "us-east-1",
        }


def secret(user: str) -> str:
    return f"{user}-secret"


@contextmanager
def serve(folder: Path) -> Iterator[S3]:
    """Run the server until the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    identities = [
        dict(name=user, credentials=[dict(accessKey=user, secretKey=secret(user))], actions=actions)
        for user, actions in ACTIONS.items()
    ]
    (folder / "s3.json").write_text(json.dumps(dict(identities=identities)))
    ports = object_store.listener_ports()
    process = _start(folder, ports)
    server = S3(f"http://127.0.0.1:{ports['s3.port']}", process.pid)
    try:
        _wait(process, server, folder / "log")
        yield server
    finally:
        process.kill()  # its data is going away; a polite end takes it more than 10 s
        process.wait()
        for socket_file in Path("/tmp").glob("seaweedfs-*.sock"):
            if any(socket_file.stem.endswith(f"-{port}") for port in ports.values()):
                socket_file.unlink()


def _start(folder: Path, ports: dict[str, int]) -> subprocess.Popen:
    (folder / "data").mkdir(exist_ok=True)
    command = object_store.server_command(folder, ports, (BUCKET,))
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env=os.environ | object_store.server_environment(folder), preexec_fn=die_with_parent,
        )  # fmt: skip


def die_with_parent() -> None:
    """Have the kernel end this process with the thread that started it; a `preexec_fn`."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _wait(process: subprocess.Popen, server: S3, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if object_store.have_buckets((BUCKET,), server.environment()):
            return
        time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not start: {log.read_text(errors='replace')[-2000:]}")
