"""Child processes for engines and trainers: memory comes back, a crash is an exit code, none outlives its parent.

A child is MODULE, run with JOB.json as its argument. It writes one JSON object a line to `JOB.progress`, everything
else to `JOB.log`, and ends with 0 or an error in the log's last lines. Its last line of progress is its peak memory.
A child that stays does not end then: it reads the name of its next JOB.json from its standard input.
"""

import ctypes
import json
import math
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from masters.common import machine
from masters.common.errors import InputError, MastersError, StoreError, WorkerError, WorkerLost
from masters.common.redaction import redact, redact_logs

PR_SET_PDEATHSIG = 1
POLL = 0.2  # seconds
POLITE = 5.0  # seconds to end in before being killed
# what children open to find each other, torch's and vLLM's sockets, stays on this machine
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}
SLOT = "MASTERS_SLOT"  # a child's place among those that run together, from 0: whose devices it may take
PEAK = "peak"  # the event of a child's last line
STAYS = "MASTERS_STAYS"  # set in the environment of a child that stays
PYTHON = "MASTERS_PYTHON"  # the program that runs children, such as a profiler's wrapper; by default this interpreter


@dataclass(frozen=True)
class Child:
    """One process to run: its module, its job (written to `folder/name.json`) and its environment's additions.

    A name may hold what no file name may, such as a hub id's slash. `standing`: whose process does the job, and starts
    for it if there is none; it ends with the job unless `stays`.
    """

    name: str
    module: str
    job: dict
    folder: Path
    environment: dict[str, str]
    standing: "Standing | None" = None
    stays: bool = False

    @property
    def job_file(self) -> Path:
        return self._file("json")

    @property
    def log(self) -> Path:
        return self._file("log")

    @property
    def progress(self) -> Path:
        return self._file("progress")

    def _file(self, kind: str) -> Path:
        return self.folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', self.name)}.{kind}"

    def said(self) -> int:
        """Bytes in its log and its progress: more of them is a sign of life."""
        return sum(file.stat().st_size for file in (self.log, self.progress) if file.exists())

    def last_word(self) -> int:
        """When it last wrote to its log, in nanoseconds."""
        return self.log.stat().st_mtime_ns


class Standing:
    """A child process that stays between runs, such as an engine that is given new weights instead of a new start.

    Use as a context manager, at whose end the process ends. `run` starts it with the first child that names it.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self.slot = 0  # its place among those that run together

    def __enter__(self) -> "Standing":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        self._close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(POLITE)
        _end([self._process])

    @property
    def alive(self) -> bool:
        """Whether there is a process to give a job to."""
        return self._process is not None and self._process.poll() is None

    def begin(self, child: Child, slots: dict[str, int]) -> subprocess.Popen:
        """Have the process do a child's job: the one that is there, or a new one."""
        if not (self.alive and self._given(child)):
            self._process, self.slot = _start(child, slots), slots[child.name]
        assert self._process
        if not child.stays:
            self._close()
        return self._process

    def _given(self, child: Child) -> bool:
        """Whether the process, which may have died unseen, took the job."""
        assert self._process and self._process.stdin
        _written(child)
        try:
            self._process.stdin.write(f"{child.job_file}\n".encode())
            self._process.stdin.flush()
        except OSError:
            return False
        return True

    def _close(self) -> None:
        """Tell the process that no job will follow."""
        assert self._process and self._process.stdin
        with suppress(OSError):
            self._process.stdin.close()


@dataclass(frozen=True)
class Ran:
    """What children took: seconds to each one's first line (imports, an engine's start), and MiB at their peak.

    `peak_mib` is that of the largest that may have run together, which bounds what all held at a time (pages that they
    share count once each; processes that children start themselves do not count).
    """

    startup_seconds: tuple[float, ...] = ()
    peak_mib: float = 0.0

    def told(self) -> dict:
        """For a stage's entry in the summary."""
        return dict(startup_seconds=list(self.startup_seconds), children_peak_mib=round(self.peak_mib))


def run(
    children: list[Child],
    at_once: int,
    on_progress: Callable[[str, dict], None],
    silence: float = math.inf,
    beside: Sequence[Child] = (),
) -> Ran:
    """Run all children, at most `at_once` together and `beside` next to them, passing on their progress lines.

    If one fails the others are ended and WorkerError says which and why; WorkerLost if a signal ended it, or if it
    wrote nothing for `silence` seconds. Also on any other exception, such as a cancellation, no child is left. A
    child that stays has ended, as far as this run is concerned, when its job is done.
    """
    waiting, running, peaks = [*beside, *sorted(children, key=_turn)], {}, []
    slots: dict[str, int] = {}
    uncounted = {child.name for child in beside}
    began, started = {}, {}
    try:
        while waiting or running:
            while waiting and (waiting[0].name in uncounted or len(running.keys() - uncounted) < at_once):
                child = waiting.pop(0)
                began[child.name] = time.monotonic()
                if child.name not in uncounted:
                    slots[child.name] = _slot(child, set(range(at_once)) - {slots.get(name) for name in running})
                process = child.standing.begin(child, slots) if child.standing else _start(child, slots)
                running[child.name] = (child, process, _Tail(child.progress), _Silence(child))
            ended = {name for name, (_, process, _, _) in running.items() if process.poll() is not None}
            done = set()
            for child, _, tail, _ in running.values():
                for line in tail.lines():
                    if line.get("event") == PEAK:
                        peaks.append(line["mib"])
                        done |= {child.name} if child.stays else set()
                    else:
                        started.setdefault(child.name, round(time.monotonic() - began[child.name], 2))
                        on_progress(child.name, line)
            for name in done - ended:
                del running[name]
            # a child that lost its peer ends too: whoever spoke last before is the cause
            for child, process, _, _ in sorted((running[name] for name in ended), key=lambda one: one[0].last_word()):
                del running[child.name]
                _judge(child, process.returncode)
            for child, _, _, quiet in running.values():
                if quiet.seconds() > silence:
                    raise WorkerLost(f"{child.name} wrote nothing for {silence:.0f} s (log: {child.log})")
            time.sleep(POLL)
    finally:
        _end([process for _, process, _, _ in running.values()])
    return Ran(tuple(started.values()), float(sum(sorted(peaks)[-at_once - len(beside) :])) if peaks else 0.0)


def report(job_file: Path, **fields: object) -> None:
    """Called in the child: one line of progress."""
    with open(job_file.with_suffix(".progress"), "a", encoding="utf-8") as file:
        file.write(json.dumps(fields) + "\n")


def jobs(first: Path) -> Iterator[Path]:
    """Called in the child: its job file, and while it stays those that follow, each with a log of its own.

    What the caller does between two of them is the job, whose end is reported.
    """
    yield first
    if not stays():
        return
    report(first, event=PEAK, mib=machine.peak_mib())
    for line in iter(sys.stdin.readline, ""):
        job_file = Path(line.rstrip("\n"))
        _log_to(job_file.with_suffix(".log"))
        yield job_file
        report(job_file, event=PEAK, mib=machine.peak_mib())


def stays() -> bool:
    """Called in the child: whether it may be given further jobs."""
    return STAYS in os.environ


def _log_to(file: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    with open(file, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


def child_main(main: Callable[[Path], None]) -> NoReturn:
    """A child's entry: its job file is the first argument; an expected error is one line and its exit code."""
    redact_logs()
    code = 0
    try:
        main(Path(sys.argv[1]))
        report(Path(sys.argv[1]), event=PEAK, mib=machine.peak_mib())
    except MastersError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except Exception:
        print(redact(traceback.format_exc()), file=sys.stderr, end="")
        code = 1
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End without taking libraries apart: an engine's process spends 7 of its 31 s on that, the kernel none."""
    for process in multiprocessing.active_children():  # vLLM's own, with tensor parallelism
        process.terminate()
        process.join(POLITE)
        process.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def die_with_parent(parent: int) -> None:
    """Called first thing in the child: the kernel ends it when the process that started it is gone."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the parent is gone")


def _turn(child: Child) -> int:
    """First whose process is there already, as its place is taken; last who will hold memory when it is done."""
    return 0 if child.standing and child.standing.alive else 2 if child.standing else 1


def _slot(child: Child, free: set[int]) -> int:
    """A free place; that of its process for a child whose process is there already."""
    return child.standing.slot if child.standing and child.standing.alive else min(free)


def _written(child: Child) -> None:
    """Its job is there, its progress is empty. Raises StoreError."""
    try:
        child.folder.mkdir(parents=True, exist_ok=True)
        child.progress.unlink(missing_ok=True)
        child.job_file.write_text(json.dumps(child.job))
        child.log.touch()
    except OSError as error:
        raise StoreError(f"work folder {child.folder} cannot be written: {error}") from error


def _start(child: Child, slots: dict[str, int]) -> subprocess.Popen:
    _written(child)
    added = {SLOT: str(slots[child.name])} if child.name in slots else {}
    added |= {STAYS: "yes"} if child.standing else {}
    python = os.environ.get(PYTHON, sys.executable)
    with open(child.log, "ab") as log:
        return subprocess.Popen(
            [python, "-m", "masters.execution.processes", str(os.getpid()), child.module, str(child.job_file)],
            stdin=subprocess.PIPE if child.standing else subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | LOOPBACK | added | child.environment,
            start_new_session=True,  # a terminal's Ctrl-C is the parent's to handle
        )


def _judge(child: Child, code: int) -> None:
    if code == 0:
        return
    lines = [line for line in child.log.read_text(errors="replace").splitlines() if line.strip()]
    said = lines[-1][:500] if lines else "it wrote nothing"
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    error = InputError if code == InputError.exit_code else WorkerLost if code < 0 else WorkerError
    raise error(f"{child.name} ended with {how}: {said} (log: {child.log})")


def _end(running: list[subprocess.Popen]) -> None:
    """All at once: together they have POLITE seconds."""
    for process in running:
        process.terminate()
    deadline = time.monotonic() + POLITE
    for process in running:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _Tail:
    """New whole lines of a file that grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0

    def lines(self) -> list[dict]:
        if not self._path.exists():
            return []
        with open(self._path, "rb") as file:
            file.seek(self._at)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


class _Silence:
    """How long a child has said nothing, by a clock that nobody sets: a machine's time of day may jump."""

    def __init__(self, child: Child) -> None:
        self._child, self._said, self._since = child, child.said(), time.monotonic()

    def seconds(self) -> float:
        if (said := self._child.said()) != self._said:
            self._said, self._since = said, time.monotonic()
        return time.monotonic() - self._since


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))  # before the seconds that a module's imports take
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
