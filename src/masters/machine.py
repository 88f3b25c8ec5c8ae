"""What this machine keeps for itself, and which of its processes still run."""

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from masters.errors import StoreError
from masters.identity import fingerprint

KEPT = 20  # tracking URIs a name


def cache() -> Path:
    """Where this machine keeps what it needs of a store that is elsewhere."""
    return Path.home() / ".cache" / "masters"


def this_process() -> str:
    """Names the running process for good: host, boot, process id, when it started, and whose process ids these are."""
    return f"{_named(os.getpid())} {_namespace()}"


@contextmanager
def turn(what: str, waiting: Callable[[], None]) -> Iterator[None]:
    """One process of this machine at a time for the same `what`. Who must wait says so first: `waiting`.

    The kernel lets go of the lock when its holder dies. Raises StoreError if the home cannot be written.
    """
    file = cache() / "locks" / fingerprint(what)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        raise StoreError(f"expected to write {file}, found: {error}") from error
    with file.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ended(process: str) -> bool | None:
    """Whether a process that `this_process` named is gone; None if it runs, or ran, on another machine or in another
    container."""
    host, boot, pid, started, namespace = (process.split(" ") + [""] * 5)[:5]
    if host != socket.gethostname() or (boot == _boot() and namespace not in ("", _namespace())):
        return None
    return boot != _boot() or not pid.isdigit() or _named(int(pid)) != f"{host} {boot} {pid} {started}"


def remember(name: str, tracking_uri: str) -> None:
    """Keep where runs of this name are tracked, for commands that are given a name alone."""
    file = _state()
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with suppress(OSError):  # a home that cannot be written costs an option on the command line, not a run
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file.with_name(f".{file.name}.lock"), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go of as the file is closed
            _remember(name, tracking_uri, file, temporary)


def _remember(name: str, tracking_uri: str, file: Path, temporary: Path) -> None:
    uris = [tracking_uri, *(uri for uri in remembered(name) if uri != tracking_uri)][:KEPT]
    temporary.touch(mode=0o600)  # the address of a database may hold its password
    temporary.write_text(json.dumps(_remembered() | {name: uris}, indent=1))
    os.replace(temporary, file)


def remembered(name: str | None = None) -> list[str]:
    """Tracking URIs of a name, the last one first; without a name those of all."""
    known = _remembered()
    if name is not None:
        return known.get(name, [])
    return list(dict.fromkeys(uri for uris in known.values() for uri in uris))


def _state() -> Path:
    return cache() / "tracking.json"


def _remembered() -> dict[str, list[str]]:
    try:
        return json.loads(_state().read_text())
    except (OSError, ValueError):
        return {}


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def _named(pid: int) -> str:
    try:
        started = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        started = "gone"
    return f"{socket.gethostname()} {_boot()} {pid} {started}"
