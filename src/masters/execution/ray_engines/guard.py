"""Ends what is left of a local Ray: waits until its standard input closes, because its parent is done or dead.

Ray's agents notice that they are orphans by asking a server that died with them, and outlived it by a minute and more.
All of a driver's processes are in the driver's session (`masters.execution.processes` gives each child its own).
"""

import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

SECONDS = 5.0  # to find new processes of dying parents in


def session(of: int) -> set[int]:
    """Processes of a session, zombies left out."""
    found = set()
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            state, _, _, sid = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:4]
            if int(sid) == of and state != "Z":
                found.add(int(entry.name))
    return found


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ours, parent, sid = os.getpid(), os.getppid(), os.getsid(0)
    if sid != parent:
        sys.exit("the driver of Ray must lead a session of its own")  # else this would end other people's processes
    sys.stdin.read()
    deadline = time.monotonic() + SECONDS
    while (left := session(sid) - {ours, parent}) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(sys.argv[1], ignore_errors=True)


if __name__ == "__main__":
    main()
