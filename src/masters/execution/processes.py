"""Run engines and trainers in child processes, which free their memory, cannot crash the flow, and end with it.

What a child does, from its job file to its exit code, is `child_process`.
"""

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel

from masters.common.errors import StoreError, WorkerLost
from masters.execution.child_exit import DISK_CODES, check_exit
from masters.execution.child_output import Heartbeat, ProgressReader
from masters.execution.child_process import GRACE_SECONDS, PEAK, PERSISTENT

POLL_SECONDS = 0.2
# the sockets through which processes of torch and vLLM find each other stay on this machine
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}
SLOT = "MASTERS_SLOT"  # number, from 0, of a child among those that run together: which devices it may take
PYTHON = "MASTERS_PYTHON"  # the program that runs children, such as a profiler's wrapper; by default this interpreter

OnProgress = Callable[[str, dict], None]  # called with a child's name and one line of its progress


class WorkerModule(StrEnum):
    """Modules that run in a process of their own. Named here, as this package must not import those above it."""

    BENCHMARK = "masters.models.generation.benchmark_worker"
    GENERATION = "masters.models.generation.worker"
    JUDGING = "masters.models.judging.worker"
    LAUNCHER = "masters.execution.child_process"
    PARITY = "masters.checks.parity_worker"
    RAY_DRIVER = "masters.execution.ray_engines.actor_pool"
    RAY_GUARD = "masters.execution.ray_engines.guard"
    TRAINING = "masters.models.training.worker"


@dataclass(frozen=True)
class Child:
    """A child process to run: its module, its job (written to `folder/name.json`) and additions to its environment.

    The name may hold characters that file names may not, such as a hub id's slash. With `persistent`, that process
    does the job, and is started for it if needed; it ends after the job unless `keep_alive` is set.
    """

    name: str
    module: str
    job: BaseModel | dict
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    persistent: "PersistentProcess | None" = None
    keep_alive: bool = False

    @property
    def job_file(self) -> Path:
        return self._file("json")

    @property
    def log(self) -> Path:
        return self._file("log")

    @property
    def progress(self) -> Path:
        return self._file("progress")

    def _file(self, suffix: str) -> Path:
        return self.folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', self.name)}.{suffix}"

    def write_job(self) -> None:
        """Write the job file, empty the log and remove the progress of an earlier attempt. Raises StoreError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.progress.unlink(missing_ok=True)
            # not pydantic's own JSON, in which a threshold may not be infinite
            job = self.job.model_dump(mode="json") if isinstance(self.job, BaseModel) else self.job
            self.job_file.write_text(json.dumps(job))
            self.log.write_bytes(b"")
        except OSError as error:
            raise StoreError(f"work folder {self.folder} cannot be written: {error}") from error


class PersistentProcess:
    """A child process that stays between runs, such as an engine that takes new weights instead of a new start.

    Use as a context manager; leaving it ends the process. `run` starts the process with the first child that names it.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self.slot: int | None = None

    def __enter__(self) -> "PersistentProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        self._close_input()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_SECONDS)
        _terminate([self._process])

    @property
    def is_alive(self) -> bool:
        """True if there is a process that can take a job."""
        return self._process is not None and self._process.poll() is None

    def start_job(self, child: Child, slot: int) -> subprocess.Popen:
        """Give a child's job to the live process, or to a new one."""
        if not (self.is_alive and self._send_job(child)):
            self._process, self.slot = _start(child, slot), slot
        assert self._process
        if not child.keep_alive:
            self._close_input()
        return self._process

    def _send_job(self, child: Child) -> bool:
        """Return whether the process, which may just have died, took the job."""
        assert self._process and self._process.stdin
        child.write_job()
        try:
            self._process.stdin.write(f"{child.job_file}\n".encode())
            self._process.stdin.flush()
        except OSError:
            return False
        return True

    def _close_input(self) -> None:
        """Tell the process that no job will follow."""
        assert self._process and self._process.stdin
        with suppress(OSError):
            self._process.stdin.close()


@dataclass(frozen=True)
class ProcessUsage:
    """Time and memory that a run of children took.

    Seconds count from each start to its first line (imports, an engine's start).

    `peak_mib` adds the largest children that may have run together, an upper bound of what all held at a time. Pages
    that children share count once for each of them; processes that children start themselves do not count.
    """

    startup_seconds: tuple[float, ...] = ()
    peak_mib: float = 0.0

    def summarize(self) -> dict:
        """Return the entries of a stage in the run's summary."""
        return dict(startup_seconds=list(self.startup_seconds), children_peak_mib=round(self.peak_mib))


def run(
    children: list[Child],
    max_running: int,
    on_progress: OnProgress,
    heartbeat_timeout: float = math.inf,
) -> ProcessUsage:
    """Run children, at most `max_running` at a time, and pass on their lines of progress.

    If a child fails, the others are ended. Raises WorkerError with the child and the reason, or InputError where the
    child exits with its code; StoreError if the child found a disk or the store full; WorkerLost if a signal ended the
    child or if it wrote nothing for `heartbeat_timeout` seconds. No child is left behind by any other exception either,
    such as a cancellation. A child that is kept alive is done when its job is.
    """
    supervisor = _Supervisor(max_running, on_progress, heartbeat_timeout)
    queue = sorted(children, key=_start_order)
    try:
        while queue or supervisor.running:
            while queue and supervisor.has_free_slot:
                child = queue.pop(0)
                supervisor.start(child, supervisor.choose_slot(child))
            supervisor.poll()
            time.sleep(POLL_SECONDS)
    finally:
        _terminate([running.process for running in supervisor.running.values()])
    largest = sorted(supervisor.peaks_mib)[-max_running:]
    return ProcessUsage(tuple(supervisor.startup_seconds.values()), float(sum(largest)))


def _start_order(child: Child) -> int:
    """Sort live persistent processes first, as they hold their slots, and new ones last: they keep their memory."""
    if child.persistent is None:
        return 1
    return 0 if child.persistent.is_alive else 2


def _start(child: Child, slot: int) -> subprocess.Popen:
    child.write_job()
    added = {SLOT: str(slot)} | ({PERSISTENT: "yes"} if child.persistent else {})
    python = os.environ.get(PYTHON, sys.executable)
    with open(child.log, "ab") as log:
        return subprocess.Popen(
            [python, "-m", WorkerModule.LAUNCHER, str(os.getpid()), child.module, str(child.job_file)],
            stdin=subprocess.PIPE if child.persistent else subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | LOOPBACK | added | child.environment,
            start_new_session=True,  # a terminal's Ctrl-C is the parent's to handle
        )


def _terminate(processes: list[subprocess.Popen]) -> None:
    """End all processes; together they have GRACE_SECONDS before they are killed."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass(frozen=True, eq=False)
class _RunningChild:
    """A started child with its process."""

    child: Child
    process: subprocess.Popen
    slot: int
    start_time: float
    progress: ProgressReader
    heartbeat: Heartbeat


class _Supervisor:
    """Starts children, passes on their progress and notices how they end."""

    def __init__(self, max_running: int, on_progress: OnProgress, heartbeat_timeout: float) -> None:
        self._max_running, self._on_progress, self._heartbeat_timeout = max_running, on_progress, heartbeat_timeout
        self.running: dict[str, _RunningChild] = {}
        self.startup_seconds: dict[str, float] = {}
        self.peaks_mib: list[float] = []

    @property
    def has_free_slot(self) -> bool:
        return len(self._used_slots) < self._max_running

    @property
    def _used_slots(self) -> set[int]:
        return {running.slot for running in self.running.values()}

    def choose_slot(self, child: Child) -> int:
        """Return the slot of the child's live process, otherwise the first free one."""
        if child.persistent and child.persistent.is_alive and child.persistent.slot is not None:
            return child.persistent.slot
        return min(set(range(self._max_running)) - self._used_slots)

    def start(self, child: Child, slot: int) -> None:
        start_time = time.monotonic()
        process = child.persistent.start_job(child, slot) if child.persistent else _start(child, slot)
        progress, heartbeat = ProgressReader(child.progress), Heartbeat(child.log, child.progress)
        self.running[child.name] = _RunningChild(child, process, slot, start_time, progress, heartbeat)

    def poll(self) -> None:
        """Pass on new progress and remove children that are done. Raises the error of one that failed."""
        # before the progress is read, so that nothing that a process wrote before its end is missed
        ended = [running for running in self.running.values() if running.process.poll() is not None]
        for running in list(self.running.values()):
            job_is_done = self._read_progress(running)
            if job_is_done and running.child.keep_alive and running not in ended:
                del self.running[running.child.name]
        # a child that lost its peer fails too: the one that found a disk full, or that wrote first, is the cause
        for running in sorted(
            ended, key=lambda r: (r.process.returncode not in DISK_CODES, r.child.log.stat().st_mtime_ns)
        ):
            del self.running[running.child.name]
            check_exit(running.child.name, running.child.log, running.process.returncode)
        for running in self.running.values():
            if running.heartbeat.silent_seconds() > self._heartbeat_timeout:
                raise WorkerLost(
                    f"{running.child.name} wrote nothing for {self._heartbeat_timeout:.0f} s (log: {running.child.log})"
                )

    def _read_progress(self, running: _RunningChild) -> bool:
        """Pass on the new lines of a child. Returns whether it reported the end of its job."""
        job_is_done, name = False, running.child.name
        for line in running.progress.read_new():
            if line.get("event") == PEAK:
                self.peaks_mib.append(line["mib"])
                job_is_done = True
            else:
                self.startup_seconds.setdefault(name, round(time.monotonic() - running.start_time, 2))
                self._on_progress(name, line)
        return job_is_done
