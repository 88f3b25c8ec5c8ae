"""A service of the local stack: a process in a session of its own, known again by its birth and by a mark.

A pid alone names nothing once its process has ended: the kernel gives it to another. A service is therefore recorded
with its birth, and everything that descends from it carries MASTERS_SERVICE in its environment, so that what it started
is found even when the service itself is gone.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from masters.common.errors import MastersError

MARK = "MASTERS_SERVICE"
POLITE_SECONDS = 10  # to end before it is killed
POLL = 0.1


@dataclass(frozen=True)
class Service:
    """What to start: its command and environment, and how one sees that it answers."""

    name: str
    command: list[str]
    environment: dict[str, str]
    answers: Callable[[], bool]
    stop_signal: int = signal.SIGTERM
    user: int | None = None  # a uid other than ours


@dataclass(frozen=True)
class Started:
    """A service that was started, as the stack's state file keeps it."""

    name: str
    pid: int
    birth: str
    mark: str
    stop_signal: int

    def alive(self) -> bool:
        return birth(self.pid) == self.birth

    def as_dict(self) -> dict:
        return asdict(self)


def start(service: Service, folder: Path, stack_id: str) -> Started:
    """Start it in `folder`, its output appended to logs/NAME.log there."""
    mark = f"{stack_id}:{service.name}"
    with open(log_of(folder, service.name), "ab") as log:
        process = subprocess.Popen(
            service.command, cwd=folder, env=service.environment | {MARK: mark}, user=service.user,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    return Started(service.name, process.pid, birth(process.pid) or "", mark, service.stop_signal)


def wait(service: Service, started: Started, folder: Path, seconds: float) -> None:
    """Until it answers. Raises MastersError if it ends or takes longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while not service.answers():
        over = time.monotonic() > deadline
        if over or not started.alive():
            log = log_of(folder, service.name)
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            what = f"did not answer within {seconds:.0f} s" if over else "ended while it started"
            raise MastersError(
                f"{service.name} {what}: {lines[-1][:300] if lines else 'it wrote nothing'} (log: {log})"
            )
        time.sleep(POLL)


def stop(started: Started) -> None:
    """End the service, then whatever it left behind."""
    if started.alive():
        _signal(started.pid, started.stop_signal)  # it may end by itself meanwhile
        _until(lambda: not started.alive())
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in marked(started.mark) | ({started.pid} if started.alive() else set()):
            _signal(pid, number)
        if _until(lambda: not started.alive() and not marked(started.mark)):
            return


def birth(pid: int) -> str | None:
    """When a process began, as "boot id:clock ticks"; None if there is none, or only its unread exit code."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *rest = stat.rpartition(")")[2].split()
    if state in "ZX":
        return None
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}:{rest[18]}"


def marked(mark: str) -> set[int]:
    """Pids of the processes that were started with this mark or inherited it."""
    entry, found = f"{MARK}={mark}".encode(), set()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            carries = entry in environment.read_bytes().split(b"\0")
        except OSError:  # gone meanwhile, or another user's
            continue
        if carries and birth(int(environment.parent.name)):
            found.add(int(environment.parent.name))
    return found


def log_of(folder: Path, name: str) -> Path:
    log = folder / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    return log


def _until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + POLITE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL)
    return True


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
