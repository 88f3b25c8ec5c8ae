"""Numeric equality by math-verify, in a process of its own. Imports no torch, and no SymPy.

A text such as "9^9^9^9" makes SymPy compute without end. math-verify's time limits are alarm signals, which only a
process's main thread takes, and flows run in other threads too; so a process of its own compares, and is replaced
when it says nothing for too long.
"""

import json
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from typing import IO

from masters.common.errors import WorkerError

LONGEST = 1000  # characters from a text's end: the final number stands there, and parsing takes long on long texts
START_SECONDS = 300.0  # to import SymPy, on a busy machine too
PAIR_SECONDS = 30.0  # more than math-verify's own limits come to
WORKER = "masters.rewards.number_worker"


@contextmanager
def comparing_numbers() -> Iterator[Callable[[str, str], bool]]:
    """A function that says whether a text's final number equals the reference's. What takes too long is not equal."""
    worker = _Worker()
    try:
        yield worker.equal
    finally:
        worker.stop()


class _Worker:
    """The process that compares: started when it is first needed, and again after one was lost."""

    def __init__(self) -> None:
        self._lock, self._process = Lock(), None

    def equal(self, text: str, reference: str) -> bool:
        pair = [text[-LONGEST:], reference[-LONGEST:]]
        with self._lock:
            process = self._process = self._process or _started()
            said = _said(process, json.dumps(pair).encode() + b"\n")
            if not said:  # it takes too long, or ran out of memory
                self.stop()
            return said == b"true\n"

    def stop(self) -> None:
        if self._process:
            _end(self._process)
            self._process = None


def _started() -> subprocess.Popen[bytes]:
    """Raises WorkerError if the process does not begin to work."""
    command = [sys.executable, "-m", WORKER]
    # a session of its own: an interrupt at the terminal is for the run, which ends this process
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    if not _line(process, START_SECONDS):
        _end(process)
        raise WorkerError(f"the process that compares numbers did not start ({WORKER}); what it said stands above")
    return process


def _said(process: subprocess.Popen[bytes], line: bytes) -> bytes:
    """What a process answers to a line, nothing if it is gone or answers too late."""
    try:
        _pipe(process.stdin).write(line)
        _pipe(process.stdin).flush()
    except BrokenPipeError:
        return b""
    return _line(process, PAIR_SECONDS)


def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """The next line that a process says, nothing if it ended or said none in time."""
    out, ready = _pipe(process.stdout), select.poll()  # select.select takes no descriptor from 1024 on
    ready.register(out)
    return out.readline() if ready.poll(seconds * 1000) else b""


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with suppress(BrokenPipeError):  # of a line that it no longer took
        process.communicate()  # closes its pipes too


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None  # as it was opened
    return stream
