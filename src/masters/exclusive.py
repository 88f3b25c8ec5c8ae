"""One run at a time builds an artifact: a lock file on a machine, a lease in the store between machines."""

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from masters.errors import StoreError
from masters.lease import leased
from masters.storage import Storage

POLL = 0.5  # seconds
Waiting = Callable[[str], None]  # hears once who is waited for


@contextmanager
def alone(storage: Storage, folder: str, work: Path, waiting: Waiting) -> Iterator[Callable[[], None]]:
    """The only run that writes below `folder` of a store. Whoever comes second waits.

    `work`: where this machine works on it. Gives a check to be called before what was built is committed: it raises
    StoreError where another run took over meanwhile.
    """
    with locked(work, waiting):
        if storage.local:
            yield lambda: None
            return
        with leased(storage, folder, lambda: waiting("another machine")) as lease:
            yield lease.check


@contextmanager
def locked(folder: Path, waiting: Waiting) -> Iterator[None]:
    """The only run on this machine that works in a folder: job files, logs and progress have fixed names in it.

    The kernel lets go of the lock when its holder dies.
    """
    try:
        (folder / "lock").touch()
    except OSError as error:
        raise StoreError(f"work folder {folder} cannot be written: {error}") from error
    with open(folder / "lock", "ab") as lock:
        told = False
        while not _taken(lock.fileno()):
            if not told:
                waiting("another run on this machine")
            told = True
            time.sleep(POLL)
        yield


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
