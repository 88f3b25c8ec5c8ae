"""One run at a time builds an artifact: a lock file on a machine, a lease in the store between machines.

A lease is an object that its holder rewrites every few seconds. Whoever waits takes over where it did not change for
`PATIENCE` seconds by the waiter's own clock: machines need not agree on the time. Each holder has a number of its own,
one more than the last, created exclusively, so one of several waiters wins; a holder that was believed dead sees the
higher number and gives up. Numbers only grow: the last holder's object stays, marked as released.
"""

import fcntl
import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

from masters.common import machine
from masters.common.errors import StoreError
from masters.common.hashing import fingerprint
from masters.common.machine import cache
from masters.store.storage import Storage

POLL = 0.5  # seconds
Waiting = Callable[[str], None]  # hears once who is waited for

BEAT = 5.0  # seconds between two signs of life
RELEASED = {"released": True}
PATIENCE = 60.0  # seconds without one, after which a holder on another machine counts as gone


@contextmanager
def exclusive_build(storage: Storage, folder: str, work: Path, waiting: Waiting) -> Iterator[Callable[[], None]]:
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


@contextmanager
def machine_lock(what: str, waiting: Callable[[], None]) -> Iterator[None]:
    """One process of this machine at a time for the same `what`. Who must wait says so first: `waiting`.

    The kernel lets go of the lock when its holder dies. Raises StoreError if the home cannot be written.
    """
    file = cache() / "locks" / fingerprint(what)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        raise StoreError(f"expected to write {file}, found: {error}") from error
    with file.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Lease:
    """The right to write below `folder`, held while `keep` runs."""

    def __init__(self, storage: Storage, folder: str) -> None:
        self._storage, self._prefix = storage, f"leases/{folder}"
        self._token, self._number, self._beats = uuid.uuid4().hex, 0, 0
        self._ended = Event()

    def take(self, waiting: Callable[[], None]) -> None:
        """Wait for it, calling `waiting` once if that takes long."""
        seen, since, told = b"", time.monotonic(), False
        while True:
            last = self._last()
            beat = self._read(last) if last else b""
            if beat != seen:
                seen, since = beat, time.monotonic()
            if last == 0 or _free(beat) or time.monotonic() - since > PATIENCE:
                if self._create(last + 1):
                    return
                continue
            if not told:
                waiting()
                told = True
            time.sleep(BEAT / 2)

    def keep(self) -> None:
        """Give signs of life until it is released; one that cannot be given is made up for by the next."""
        while not self._ended.wait(BEAT):
            self._beats += 1
            with suppress(StoreError, FileNotFoundError):
                self._storage.write(self._name(self._number), self._beat())

    def check(self) -> None:
        """Raises StoreError if another holder took over: what this one would commit is no longer its own."""
        if self._last() != self._number:
            raise StoreError(
                f"another run took over {self._prefix} as this one gave no sign of life for {PATIENCE:.0f} s"
            )

    def release(self) -> None:
        self._ended.set()
        with suppress(StoreError, FileNotFoundError):  # whoever waits is patient
            if self._last() == self._number:
                self._storage.write(self._name(self._number), json.dumps(RELEASED).encode())
            for name in self._storage.names(self._prefix):
                if _number(name) < self._number:
                    self._storage.remove(name)

    def _last(self) -> int:
        return max(map(_number, self._storage.names(self._prefix)), default=0)

    def _read(self, number: int) -> bytes:
        try:
            return self._storage.read(self._name(number))
        except FileNotFoundError:
            return b""  # a later holder has tidied up

    def _create(self, number: int) -> bool:
        self._number, beat = number, self._beat()
        # a lost answer makes `create` say that somebody else was first: go by what is there
        return self._storage.create(self._name(number), beat) or self._read(number) == beat

    def _beat(self) -> bytes:
        return json.dumps(dict(process=machine.this_process(), holder=self._token, beats=self._beats)).encode()

    def _name(self, number: int) -> str:
        return f"{self._prefix}/{number:08d}"


@contextmanager
def leased(storage: Storage, folder: str, waiting: Callable[[], None]) -> Iterator[Lease]:
    """A lease on a folder of the store, kept alive by a thread while the body runs."""
    lease = Lease(storage, folder)
    lease.take(waiting)
    Thread(target=lease.keep, name=f"lease {folder}", daemon=True).start()
    try:
        yield lease
    finally:
        lease.release()


def _free(beat: bytes) -> bool:
    """Whether a holder has released it, or is a process of this machine that has ended."""
    try:
        found = json.loads(beat)
    except ValueError:  # it is being written, or was tidied up
        return False
    return found == RELEASED or bool(machine.ended(found["process"]))


def _number(name: str) -> int:
    return int(name.rsplit("/", 1)[-1])
