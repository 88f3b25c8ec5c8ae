"""Locks for builds: a lock file excludes runs on the same machine, a lease in the store those on other machines.

A lease is an object that its holder rewrites every few seconds. A waiting run takes over once the object has stayed the
same for `HEARTBEAT_TIMEOUT` seconds by its own clock, so machines need not agree on the time. Each holder creates an
object with the next number exclusively, so one of several waiting runs wins; a holder that was wrongly believed dead
sees the higher number and stops. Numbers only grow: the last holder's object stays, marked as released.
"""

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

from filelock import FileLock, Timeout

from masters.common import machine
from masters.common.errors import StoreError
from masters.common.files import check_writable
from masters.common.hashing import fingerprint
from masters.common.machine import CACHE, cache_folder
from masters.store.storage import Storage

POLL_INTERVAL = 0.5  # seconds between two attempts to lock a file
HEARTBEAT_INTERVAL = 5.0  # seconds between two writes of a lease
HEARTBEAT_TIMEOUT = 60.0  # seconds without a write after which a holder on another machine counts as gone
RELEASED = {"released": True}

WaitCallback = Callable[[str], None]  # called once, with a description of the holder, before a run waits


@contextmanager
def exclusive_build(storage: Storage, folder: str, work: Path, on_wait: WaitCallback) -> Iterator[Callable[[], None]]:
    """Wait until no other run writes below `folder` of the store, and keep others out while the body runs.

    `work` is this machine's work folder for the artifact. Yields a check to call before the commit: it raises
    StoreError if another run took over meanwhile.
    """
    with folder_lock(work, on_wait):
        if storage.local:
            yield lambda: None
            return
        with hold_lease(storage, folder, lambda: on_wait("another machine")) as lease:
            yield lease.check_held


def folder_lock(folder: Path, on_wait: WaitCallback) -> AbstractContextManager[None]:
    """Lock a work folder against other runs on this machine: job files, logs and progress have fixed names in it."""
    return _file_lock(folder / "lock", lambda: on_wait("another run on this machine"))


def machine_lock(name: str, on_wait: Callable[[], None]) -> AbstractContextManager[None]:
    """Lock `name` against other processes of this user on this machine. Raises InputError if no lock can be written."""
    folder = cache_folder() / "locks"
    check_writable(folder, "locks of this machine", f"set {CACHE} or HOME to another folder")
    return _file_lock(folder / fingerprint(name), on_wait)


@contextmanager
def _file_lock(file: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock file while the body runs. Calls `on_wait` once before it waits.

    The kernel releases the lock when its holder dies. Raises StoreError if the file cannot be written.
    """
    lock = FileLock(file, thread_local=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        on_wait()
        lock.acquire(poll_interval=POLL_INTERVAL)
    except OSError as error:
        raise StoreError(f"lock file {file} cannot be written: {error}") from error
    try:
        yield
    finally:
        lock.release()


class Lease:
    """The right to write below `folder`, held while `send_heartbeats` runs."""

    def __init__(self, storage: Storage, folder: str) -> None:
        self._storage, self._prefix = storage, f"leases/{folder}"
        self._token, self._number, self._heartbeats = uuid.uuid4().hex, 0, 0
        self._released = Event()

    def acquire(self, on_wait: Callable[[], None]) -> None:
        """Wait until no other holder is alive. Calls `on_wait` once before it waits."""
        previous, changed, notified = b"", time.monotonic(), False
        while True:
            last = self._last_number()
            content = self._read(last) if last else b""
            if content != previous:
                previous, changed = content, time.monotonic()
            if last == 0 or _is_free(content) or time.monotonic() - changed > HEARTBEAT_TIMEOUT:
                if self._create(last + 1):
                    return
                continue
            if not notified:
                on_wait()
                notified = True
            time.sleep(HEARTBEAT_INTERVAL / 2)

    def send_heartbeats(self) -> None:
        """Rewrite the lease until it is released. The next write makes up for a failed one."""
        while not self._released.wait(HEARTBEAT_INTERVAL):
            self._heartbeats += 1
            with suppress(StoreError, FileNotFoundError):
                self._storage.write(self._name(self._number), self._content())

    def check_held(self) -> None:
        """Raise StoreError if another holder took over, so that this one must not commit."""
        if self._last_number() != self._number:
            raise StoreError(
                f"another run took over {self._prefix}, because this run's lease was not renewed for "
                f"{HEARTBEAT_TIMEOUT:.0f} s"
            )

    def release(self) -> None:
        """Mark the lease as released and remove the objects of earlier holders."""
        self._released.set()
        with suppress(StoreError, FileNotFoundError):  # a waiting run takes over after the timeout
            if self._last_number() == self._number:
                self._storage.write(self._name(self._number), json.dumps(RELEASED).encode())
            for name in self._storage.names(self._prefix):
                if _number(name) < self._number:
                    self._storage.remove(name)

    def _last_number(self) -> int:
        return max(map(_number, self._storage.names(self._prefix)), default=0)

    def _read(self, number: int) -> bytes:
        try:
            return self._storage.read(self._name(number))
        except FileNotFoundError:
            return b""  # a later holder removed it

    def _create(self, number: int) -> bool:
        self._number, content = number, self._content()
        # after a lost response, `create` returns False although it wrote: compare what is stored
        return self._storage.create(self._name(number), content) or self._read(number) == content

    def _content(self) -> bytes:
        return json.dumps(dict(process=machine.this_process(), holder=self._token, beats=self._heartbeats)).encode()

    def _name(self, number: int) -> str:
        return f"{self._prefix}/{number:08d}"


@contextmanager
def hold_lease(storage: Storage, folder: str, on_wait: Callable[[], None]) -> Iterator[Lease]:
    """Hold a lease on a folder of the store while the body runs; a thread renews it."""
    lease = Lease(storage, folder)
    lease.acquire(on_wait)
    Thread(target=lease.send_heartbeats, name=f"lease {folder}", daemon=True).start()
    try:
        yield lease
    finally:
        lease.release()


def _is_free(content: bytes) -> bool:
    """Return whether a lease was released, or its holder is a process of this machine that has ended."""
    try:
        found = json.loads(content)
    except ValueError:  # the object is being written, or was removed
        return False
    return found == RELEASED or bool(machine.has_ended(found["process"]))


def _number(name: str) -> int:
    return int(name.rsplit("/", 1)[-1])
