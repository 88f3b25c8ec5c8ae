"""Output of a child process: its log file, its lines of progress, and how long it has written nothing."""

import json
import os
import sys
import time
from pathlib import Path


class ProgressReader:
    """Reads the complete lines that were added to a growing file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def read_new(self) -> list[dict]:
        """Return the lines that were completed since the last call."""
        if not self._path.exists():
            return []
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            data = file.read()
        lines = data[: data.rfind(b"\n") + 1]
        self._offset += len(lines)
        return [json.loads(line) for line in lines.splitlines()]


class Heartbeat:
    """Measures how long none of some files has grown, by the monotonic clock: the time of day may jump."""

    def __init__(self, *files: Path) -> None:
        self._files = files
        self._bytes, self._since = self._count_bytes(), time.monotonic()

    def silent_seconds(self) -> float:
        """Return the seconds for which calls have seen no file grow."""
        if (written := self._count_bytes()) != self._bytes:
            self._bytes, self._since = written, time.monotonic()
        return time.monotonic() - self._since

    def _count_bytes(self) -> int:
        return sum(file.stat().st_size for file in self._files if file.exists())


def redirect_output(file: Path) -> None:
    """Append this child's stdout and stderr to another file from now on."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(file, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
