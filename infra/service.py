"""Starts and stops the services of the local stack, and waits until servers are ready.

The kernel reuses the id of an ended process. So a service is recorded with its process's birth, and all its descendants
inherit MASTERS_SERVICE in their environment, by which they are found even when the service itself has ended.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from masters.common.errors import MastersError
from masters.common.log_errors import find_error
from masters.common.machine import process_birth

MARK = "MASTERS_SERVICE"
STOP_SECONDS = 10  # to end before it is killed
POLL_INTERVAL = 0.1


@dataclass(frozen=True)
class Service:
    """A service to start: its command and environment, and a check that it is ready."""

    name: str
    command: list[str]
    environment: dict[str, str]
    is_ready: Callable[[], bool]
    stop_signal: int = signal.SIGTERM
    user: int | None = None  # uid of another user


@dataclass(frozen=True)
class StartedService:
    """A started service, as in the stack's state file."""

    name: str
    pid: int
    birth: str
    mark: str
    stop_signal: int
    log_start: int = 0  # bytes that its log had before; state files of older versions do not have it

    def is_alive(self) -> bool:
        """Return whether its process still runs."""
        return process_birth(self.pid) == self.birth

    def as_dict(self) -> dict:
        return asdict(self)


def start_service(service: Service, folder: Path, stack_id: str) -> StartedService:
    """Start a service in `folder`. Its output is appended to logs/NAME.log there."""
    mark = f"{stack_id}:{service.name}"
    with open(log_file(folder, service.name), "ab") as log:
        log_start = log.tell()
        process = subprocess.Popen(
            service.command,
            cwd=folder,
            env=service.environment | {MARK: mark},
            user=service.user,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    birth = process_birth(process.pid) or ""
    return StartedService(service.name, process.pid, birth, mark, service.stop_signal, log_start)


def wait_until_ready(service: Service, started: StartedService, folder: Path, seconds: float) -> None:
    """Wait until a service is ready. Raises MastersError if it ends, or is not ready within `seconds`."""
    if wait_for(lambda: service.is_ready() or not started.is_alive(), seconds) and started.is_alive():
        return
    failure = f"did not answer within {seconds:.0f} s" if started.is_alive() else "ended while it started"
    log = log_file(folder, service.name)
    output = log.read_bytes()[started.log_start :].decode(errors="replace")  # not that of earlier starts
    raise MastersError(f"{service.name} {failure}: {find_error(output)} (log: {log})")


def stop_service(started: StartedService) -> None:
    """End a service and all its descendants."""
    if started.is_alive():
        _send_signal(started.pid, started.stop_signal)
        wait_for(lambda: not started.is_alive())
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in find_marked_processes(started.mark) | ({started.pid} if started.is_alive() else set()):
            _send_signal(pid, number)
        if wait_for(lambda: not started.is_alive() and not find_marked_processes(started.mark)):
            return


def find_marked_processes(mark: str) -> set[int]:
    """Return the ids of the processes that were started with this mark or inherited it."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended, or belongs to another user
            if process.environ().get(MARK) == mark and process_birth(process.pid):
                found.add(process.pid)
    return found


def log_file(folder: Path, name: str) -> Path:
    """Return the log of a service, and create its folder."""
    log = folder / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    return log


def wait_for(condition: Callable[[], bool], seconds: float | None = None) -> bool:
    """Wait up to `seconds`, by default `STOP_SECONDS`. Returns whether the condition became true."""
    deadline = time.monotonic() + (STOP_SECONDS if seconds is None else seconds)
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_INTERVAL)
    return True


def _send_signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
