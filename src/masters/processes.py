"""Child processes for engines and trainers: memory comes back, a crash is an exit code, none outlives its parent.

A child is `python -m MODULE JOB.json`. It writes one JSON object a line to `JOB.progress`, everything else to
`JOB.log`, and ends with 0 or an error in the log's last lines. Its last line of progress is its peak memory.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from masters import memory
from masters.errors import InputError, MastersError, WorkerError

PR_SET_PDEATHSIG = 1
POLL = 0.2  # seconds
PEAK = "peak"  # the event of a child's last line


@dataclass(frozen=True)
class Child:
    """One process to run: its module, its job (written to `folder/name.json`) and its environment's additions."""

    name: str
    module: str
    job: dict
    folder: Path
    environment: dict[str, str]

    @property
    def job_file(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def progress(self) -> Path:
        return self.folder / f"{self.name}.progress"


def run(children: list[Child], at_once: int, on_progress: Callable[[str, dict], None]) -> float:
    """Run all children, at most `at_once` together, passing on their progress lines.

    Returns MiB: the peaks of the `at_once` largest together, which bounds what all held at a time (pages that they
    share count once each; processes that children start themselves do not count).

    If one fails the others are ended and WorkerError says which and why. Also on any other exception, such as a
    cancellation, no child is left.
    """
    waiting, running, peaks = list(children), {}, []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                child = waiting.pop(0)
                running[child.name] = (child, _start(child), _Tail(child.progress))
            for child, process, tail in list(running.values()):
                ended = process.poll() is not None
                for line in tail.lines():
                    if line.get("event") == PEAK:
                        peaks.append(line["mib"])
                    else:
                        on_progress(child.name, line)
                if ended:
                    del running[child.name]
                    _judge(child, process.returncode)
            time.sleep(POLL)
    finally:
        for _, process, _ in running.values():
            _end(process)
    return sum(sorted(peaks)[-at_once:]) if peaks else 0.0


def report(job_file: Path, **fields: object) -> None:
    """Called in the child: one line of progress."""
    with open(job_file.with_suffix(".progress"), "a", encoding="utf-8") as file:
        file.write(json.dumps(fields) + "\n")


def child_main(main: Callable[[Path], None]) -> None:
    """A child's entry: its job file is the first argument; an expected error is one line and its exit code."""
    die_with_parent()
    try:
        main(Path(sys.argv[1]))
        report(Path(sys.argv[1]), event=PEAK, mib=memory.peak_mib())
    except MastersError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def die_with_parent() -> None:
    """Called first thing in the child: the kernel ends it when its parent is gone."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        sys.exit("the parent is gone")


def _start(child: Child) -> subprocess.Popen:
    child.folder.mkdir(parents=True, exist_ok=True)
    child.progress.unlink(missing_ok=True)
    child.job_file.write_text(json.dumps(child.job))
    with open(child.log, "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", child.module, str(child.job_file)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | child.environment,
            start_new_session=True,  # a terminal's Ctrl-C is the parent's to handle
        )


def _judge(child: Child, code: int) -> None:
    if code == 0:
        return
    lines = [line for line in child.log.read_text(errors="replace").splitlines() if line.strip()]
    said = lines[-1][:500] if lines else "it wrote nothing"
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    error = InputError if code == InputError.exit_code else WorkerError
    raise error(f"{child.name} ended with {how}: {said} (log: {child.log})")


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(5)
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
