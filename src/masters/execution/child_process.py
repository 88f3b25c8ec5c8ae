"""The child's side of a child process: do the job in `JOB.json`, report progress, and end with the parent.

It writes one JSON object a line to `JOB.progress` and everything else to `JOB.log`. It ends with exit code 0, or with
an error in its log (`child_exit`). The last line of progress is its peak memory. A persistent process does not end
after its job: it reads the name of the next `JOB.json` from its standard input.

`python -m masters.execution.child_process PARENT MODULE JOB.json` runs the module with the job file as its argument;
`processes` starts it.
"""

import ctypes
import json
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from pydantic import BaseModel

from masters.common import machine
from masters.common.redaction import redact_logs
from masters.execution.child_exit import report_error
from masters.execution.child_output import redirect_output

PR_SET_PDEATHSIG = 1
GRACE_SECONDS = 5.0  # between the request to end and the kill
PEAK = "peak"  # event that ends a job
PERSISTENT = "MASTERS_PERSISTENT"  # set in the environment of a persistent process


def report(job_file: Path, **fields: object) -> None:
    """Write one line of progress, from the child."""
    with open(job_file.with_suffix(".progress"), "a", encoding="utf-8") as file:
        file.write(json.dumps(fields) + "\n")


def report_event(job_file: Path, event: BaseModel) -> None:
    """Write an event as one line of progress, from the child."""
    report(job_file, **event.model_dump(mode="json"))


def _report_end(job_file: Path) -> None:
    """Report that a job is done, with this process's peak memory."""
    report(job_file, event=PEAK, mib=machine.peak_memory_mib())


def iterate_jobs(first: Path) -> Iterator[Path]:
    """Yield the child's job file and, in a persistent process, those that follow, each with its own log.

    Asking for the next job reports that the one before is done.
    """
    yield first
    if not is_persistent():
        return
    _report_end(first)
    for line in iter(sys.stdin.readline, ""):
        job_file = Path(line.rstrip("\n"))
        redirect_output(job_file.with_suffix(".log"))
        yield job_file
        _report_end(job_file)


def is_persistent() -> bool:
    """Return whether this child is persistent: further jobs may follow."""
    return PERSISTENT in os.environ


def child_main(main: Callable[[Path], None]) -> NoReturn:
    """Run `main` on the job file that is the first argument, then exit.

    An expected error becomes one line on stderr and its exit code, any other one a traceback and exit code 1. If a disk
    or the store is full, the exit code says so.
    """
    redact_logs()
    code = 0
    try:
        main(Path(sys.argv[1]))
        _report_end(Path(sys.argv[1]))
    except Exception as error:
        code = report_error(error)
    _exit_at_once(code)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this child when the process that started it is gone."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the parent is gone")


def _exit_at_once(code: int) -> NoReturn:
    """Exit without Python's cleanup, on which an engine's process spends 7 of its 31 s."""
    for process in multiprocessing.active_children():  # vLLM's own, with tensor parallelism
        process.terminate()
        process.join(GRACE_SECONDS)
        process.kill()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))  # before the seconds that a module's imports take
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
