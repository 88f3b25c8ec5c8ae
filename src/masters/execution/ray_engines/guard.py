"""End what is left of a local Ray: wait until standard input closes, because the parent is done or dead, then kill.

Ray's agents notice that they are orphans by asking a server that died with them, and outlive it by a minute and more.
All processes of a driver are in the driver's session, as `masters.execution.processes` gives each child its own.
"""

import os
import shutil
import signal
import sys
import time
from contextlib import suppress

import psutil

SECONDS = 5.0  # during which dying parents may still start processes


def session_processes(session_id: int) -> set[int]:
    """Return the ids of a session's processes, without zombies."""
    found = set()
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == session_id and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
    return found


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent, session_id = os.getppid(), os.getsid(0)
    if session_id != parent:  # otherwise this would kill processes of other programs
        sys.exit("the Ray driver must lead a session of its own")
    sys.stdin.read()
    deadline = time.monotonic() + SECONDS
    while (remaining := session_processes(session_id) - {os.getpid(), parent}) and time.monotonic() < deadline:
        for pid in remaining:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(sys.argv[1], ignore_errors=True)


if __name__ == "__main__":
    main()
