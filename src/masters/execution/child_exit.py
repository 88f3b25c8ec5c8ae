"""Reports the error with which a child process ends: it writes the reason into its log, and its parent raises it."""

import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from masters.common import disk_space
from masters.common.errors import InputError, MastersError, StoreError, WorkerError, WorkerLost
from masters.common.log_errors import MARK, MAX_CHARACTERS, find_error
from masters.common.redaction import redact

# exit codes of a child whose file could not grow: its log may be empty for the same reason
DISK_CODES = tuple(disk_space.REMEDIES)


def report_error(error: Exception) -> int:
    """Write, from the child, the reason of its end as the last line of its log. Returns the exit code.

    An unexpected error also leaves its traceback.
    """
    is_expected = isinstance(error, MastersError)
    text = str(error) if is_expected else f"{type(error).__name__}: {error}"
    reason = " ".join(redact(text).split())[:MAX_CHARACTERS]  # redacted first: a secret must not be cut in two
    with suppress(OSError):
        if not is_expected:
            print(redact("".join(traceback.format_exception(error))), file=sys.stderr, end="")
        print(f"{MARK}{reason}", file=sys.stderr, flush=True)
    if number := disk_space.find_errno(error):
        return number
    return error.exit_code if isinstance(error, MastersError) else 1


def check_exit(name: str, log: Path, code: int) -> None:
    """Raise the error of a child that failed, with the last error in its log."""
    if code == 0:
        return
    reason = find_error(log.read_text(errors="replace"))
    if code in DISK_CODES:
        cause = OSError(code, os.strerror(code))
        raise StoreError(f"{name} stopped: {cause.strerror}: {reason} (log: {log})") from cause
    end = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    error = InputError if code == InputError.exit_code else WorkerLost if code < 0 else WorkerError
    raise error(f"{name} ended with {end}: {reason} (log: {log})")
