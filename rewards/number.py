"""Verifier for numeric answers: equality by math-verify, in a separate process. Imports no torch and no SymPy.

A text such as "9^9^9^9" makes SymPy compute without end. math-verify's time limits are alarm signals, which only reach
the main thread of a process, and flows run in other threads too. So a separate process compares the numbers, and it is
replaced if it does not answer in time.
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

MAX_LENGTH = 1000  # characters from a text's end, where the final number is: parsing takes long on long texts
START_SECONDS = 300.0  # to import SymPy, on a busy machine too
PAIR_SECONDS = 30.0  # more than the sum of math-verify's own limits
WORKER = "masters.rewards.number_worker"


@contextmanager
def number_comparison() -> Iterator[Callable[[str, str], bool]]:
    """Yield a function that returns whether the final numbers of a text and of a reference are equal.

    A comparison that takes too long returns False.
    """
    comparer = _NumberComparer()
    try:
        yield comparer.equal
    finally:
        comparer.stop()


class _NumberComparer:
    """Owns the process that compares numbers: starts it when it is first needed, and again after it was stopped."""

    def __init__(self) -> None:
        self._lock, self._process = Lock(), None

    def equal(self, text: str, reference: str) -> bool:
        pair = [text[-MAX_LENGTH:], reference[-MAX_LENGTH:]]
        with self._lock:
            process = self._process = self._process or _start()
            answer = _exchange_lines(process, json.dumps(pair).encode() + b"\n")
            if not answer:  # it takes too long, or ran out of memory
                self.stop()
            return answer == b"true\n"

    def stop(self) -> None:
        if self._process:
            _kill(self._process)
            self._process = None


def _start() -> subprocess.Popen[bytes]:
    """Start the process and wait until it is ready. Raises WorkerError if it does not become ready in time."""
    command = [sys.executable, "-m", WORKER]
    # a session of its own: an interrupt at the terminal is for the run, which stops this process
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    if not _read_line(process, START_SECONDS):
        _kill(process)
        raise WorkerError(f"the process that compares numbers did not start ({WORKER}); its output is above")
    return process


def _exchange_lines(process: subprocess.Popen[bytes], line: bytes) -> bytes:
    """Send a line and return the answer; empty if the process is gone or does not answer in time."""
    try:
        _pipe(process.stdin).write(line)
        _pipe(process.stdin).flush()
    except BrokenPipeError:
        return b""
    return _read_line(process, PAIR_SECONDS)


def _read_line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """Read the process's next line; empty if it ended or wrote none in time."""
    stdout, ready = _pipe(process.stdout), select.poll()  # select.select takes no file descriptor above 1023
    ready.register(stdout)
    return stdout.readline() if ready.poll(seconds * 1000) else b""


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with suppress(BrokenPipeError):  # from a line that the process did not read
        process.communicate()  # closes its pipes too


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None  # opened by Popen
    return stream
