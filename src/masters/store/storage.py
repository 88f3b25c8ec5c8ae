"""One small door to files and S3: whole-object writes, exclusive creation, listings. Everything goes through fsspec."""

import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import fsspec
from botocore.exceptions import HTTPClientError

from masters.common.errors import InputError, MastersError, StoreError, Unreachable
from masters.common.hashing import digest
from masters.common.machine import cache
from masters.config import allowlist
from masters.config.allowlist import Setting

TEMPORARY = re.compile(r"(^|/)\.[^/]+\.[0-9a-f]{8}\.tmp$")  # a local write that is under way
ATTEMPTS = 8  # with growing pauses: a store that is away for half a minute costs that time only
CONFLICTS = 20
ABANDONED = 3600.0  # seconds
AT_ONCE = 8  # threads that a server is worth asking from: most of the time is waiting for its answers
P = ParamSpec("P")
R = TypeVar("R")


def _one_line(method: Callable[Concatenate["Storage", P], R]) -> Callable[Concatenate["Storage", P], R]:
    """Whatever a client library raises becomes a StoreError; what is not there stays a FileNotFoundError."""

    @wraps(method)
    def wrapped(self: "Storage", *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except (FileNotFoundError, MastersError):
            raise
        except Exception as error:  # the client libraries raise what they like
            raise StoreError(f"store {self.uri('')}: {_said(error)}") from error

    return wrapped


class Storage:
    """Objects below one root. Paths are relative to it and use forward slashes.

    A reader never sees half an object, after a power cut either: local writes go to a sibling name first, are flushed
    to the disk and renamed, S3 writes appear when they are complete. Listings are fresh: what another process wrote is
    seen.
    """

    def __init__(self, root: str, patient: bool = True) -> None:
        """`patient`: an S3 store that cannot be reached is tried again for about a minute."""
        self.fs, base = fsspec.core.url_to_fs(root, **_options(root, patient))
        self.base = base.rstrip("/")
        self.local = "file" in _protocols(self.fs)
        if self.local and self.base:  # one store has one name, by whichever link or ".." it was reached
            self.base = os.path.realpath(self.base)
        self.s3 = "s3" in _protocols(self.fs)
        self.at_once = 1 if self.local else AT_ONCE
        if self.s3:
            self.fs.retries = 2 if patient else 1  # each of them ATTEMPTS of the client beneath
            if not self.base:
                raise ValueError("it names no bucket; expected s3://bucket/prefix")

    def path(self, name: str) -> str:
        return f"{self.base}/{name}" if name else self.base

    def uri(self, name: str) -> str:
        """Absolute: a plain path for local files, protocol and path otherwise."""
        return self.path(name) if self.local else self.fs.unstrip_protocol(self.path(name))

    @_one_line
    def exists(self, name: str) -> bool:
        """Whether there is an object of this name; a folder is none."""
        try:
            return self.fs.info(self.path(name))["type"] == "file"
        except (FileNotFoundError, NotADirectoryError):
            return False

    @_one_line
    def read(self, name: str) -> bytes:
        return self.fs.cat_file(self.path(name))

    @_one_line
    def digest(self, name: str) -> str:
        """SHA-256 of an object, read in pieces."""
        with self.fs.open(self.path(name), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]

    @_one_line
    def write(self, name: str, data: bytes) -> None:
        """Write or replace a whole object."""
        if self.local:
            with self._sibling(name) as temporary:
                temporary.write_bytes(data)
                _settle(temporary, self.path(name), os.replace)
        else:
            self.fs.pipe_file(self.path(name), data)

    @_one_line
    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless it is there. Returns whether this call wrote it; one of several racers wins.

        On S3 an answer may get lost and be asked for again; then the call that wrote says False. So go by what is
        there, not by who wrote it.
        """
        if self.local:
            with self._sibling(name) as temporary:
                temporary.write_bytes(data)
                return _created(lambda: _settle(temporary, self.path(name), os.link))
        return _created(lambda: self.fs.pipe_file(self.path(name), data, mode="create"))

    @_one_line
    def remove(self, name: str) -> None:
        """Remove an object if it is there."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    @_one_line
    def prune(self, folder: str) -> None:
        """Remove the empty folders that files leave behind, from `folder` down; object stores have none."""
        for at, _, _ in os.walk(self.path(folder), topdown=False) if self.local else ():
            with suppress(OSError):  # not empty
                os.rmdir(at)

    @_one_line
    def sweep(self, folder: str) -> None:
        """Remove what killed writers left unfinished below `folder`: no write goes an hour without a byte."""
        for path in _walk(self.path(folder)) if self.local else ():
            with suppress(FileNotFoundError):
                if TEMPORARY.search(path) and time.time() - os.stat(path).st_mtime > ABANDONED:
                    os.unlink(path)

    @_one_line
    def names(self, prefix: str) -> list[str]:
        """Names of all objects below the folder `prefix`, sorted; empty if there is none."""
        below = f"{self.path(prefix)}/"
        found = _walk(below) if self.local else self.fs.find(self.path(prefix))
        # a store may answer with the folder itself, or with markers of folders
        return sorted(
            f[len(self.base) + 1 :]
            for f in found
            if f.startswith(below) and not f.endswith("/") and not TEMPORARY.search(f)
        )

    @_one_line
    def details(self, prefix: str) -> dict[str, tuple[int, float]]:
        """Of all objects below the folder `prefix`: name to bytes and when it was last written, in Unix seconds."""
        if not self.local:
            found = self.fs.find(self.path(prefix), detail=True)
            known = {f[len(self.base) + 1 :]: (i["size"], i["LastModified"].timestamp()) for f, i in found.items()}
            return {name: known[name] for name in self.names(prefix) if name in known}
        details = {}
        for name in self.names(prefix):
            with suppress(FileNotFoundError):  # gone meanwhile
                found = os.stat(self.path(name))
                details[name] = (found.st_size, found.st_mtime)
        return details

    @_one_line
    def children(self, prefix: str) -> list[str]:
        """Names of the folders directly below `prefix`, sorted. S3 stores may still list one that was emptied."""
        try:
            entries = self.fs.ls(self.path(prefix), detail=True)
        except FileNotFoundError:
            return []
        return sorted(e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries if e["type"] == "directory")

    @_one_line
    def upload(self, source: Path, name: str) -> None:
        """Copy a local file or folder to `name`."""
        for file in sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]:
            target = f"{name}/{file.relative_to(source).as_posix()}" if source.is_dir() else name
            if self.local:
                with self._sibling(target) as temporary:
                    shutil.copyfile(file, temporary)
                    _settle(temporary, self.path(target), os.replace)
            else:
                self.fs.put_file(str(file), self.path(target))

    @_one_line
    def copy(self, source: str, target: str) -> None:
        """Copy an object inside the store (a hard link where files allow it)."""
        if self.local:
            with self._sibling(target) as temporary:
                try:
                    os.link(self.path(source), temporary)
                except OSError:
                    shutil.copyfile(self.path(source), temporary)
                _settle(temporary, self.path(target), os.replace)
        else:
            self.fs.cp_file(self.path(source), self.path(target))

    @_one_line
    def download(self, name: str, folder: Path) -> Path:
        """A local folder with the objects below `name`: the objects themselves if the store is local, else `folder`.

        `folder` is there whole or not at all. If it is there, it is used as it is: name it by its content.
        """
        if self.local:
            return Path(self.path(name))
        if folder.is_dir():
            return folder
        names = self.names(name)
        if not names:
            raise FileNotFoundError(f"nothing lies at {self.uri(name)}")
        temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            for found in names:
                target = temporary / found[len(name) + 1 :]
                target.parent.mkdir(parents=True, exist_ok=True)
                self.fs.get_file(self.path(found), str(target))
            _take_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return folder

    def check(self) -> None:
        """Prove, within seconds, that the store can be listed, written, read and created in. Raises InputError, where a
        server does not answer Unreachable."""
        data = uuid.uuid4().bytes
        name = f".check-{data.hex()}" if self.local else f".check/{data.hex()}"
        try:
            probe = Storage(self.uri(""), patient=False)
            probe.create(name, data)
            again, right = probe.create(name, b"again"), probe.read(name) == data
            listed = self.local or name in probe.names(".check")
            probe.remove(name)
        except Exception as error:  # the client libraries raise what they like
            reason = _said((error.__cause__ or error) if isinstance(error, StoreError) else error)
            hint = "; endpoint and keys are taken from the AWS_* variables" if self.s3 else ""
            kind = Unreachable if _unreachable(error) else InputError
            raise kind(f"store {self.uri('')} cannot be written and read back: {reason}{hint}") from error
        if again or not right:
            raise InputError(
                f"store {self.uri('')} does not honour conditional writes; use a file system or an S3 store that does"
            )
        if not listed:
            raise InputError(f"store {self.uri('')} does not list what was just written; use a store that does")

    @contextmanager
    def _sibling(self, name: str) -> Iterator[Path]:
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def _options(root: str, patient: bool) -> dict:
    """fsspec's: no cached listings, nor a client made when the environment was another."""
    options: dict = dict(use_listings_cache=False, skip_instance_cache=True)
    if root.startswith(("s3://", "s3a://")):
        options["session"] = _session()
        timeouts = dict(connect_timeout=5, read_timeout=30) if patient else dict(connect_timeout=3, read_timeout=5)
        options["config_kwargs"] = timeouts | dict(retries=dict(total_max_attempts=ATTEMPTS if patient else 2))
    return options


def _session() -> object:
    """An S3 session that sends bodies without asking first: no timeout ends the wait for a "100 Continue"."""
    from aiobotocore.session import AioSession
    from botocore.handlers import add_expect_header

    session = AioSession()
    session.unregister("before-call.s3", add_expect_header)
    return session


def _created(write: Callable[[], None]) -> bool:
    for _ in range(CONFLICTS):
        try:
            write()
        except FileExistsError:
            return False
        except OSError as error:
            # s3fs raises a refused If-None-Match as EINVAL, and EBUSY where a racer's write was under way
            code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
            if code == "PreconditionFailed":
                return False
            if code != "ConditionalRequestConflict":
                raise
        else:
            return True
    raise OSError(f"another writer was in the way {CONFLICTS} times")


def _settle(temporary: Path, target: str, how: Callable[[Path, str], None]) -> None:
    """Give a written file its name, by `how`; both are on the disk when this returns."""
    _flush(temporary)
    how(temporary, target)
    _flush(Path(target).parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _walk(folder: str) -> Iterator[str]:
    """Paths of all files below. What goes away meanwhile is left out; what cannot be read is an error."""

    def judge(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for at, _, files in os.walk(folder, onerror=judge):
        yield from (f"{at.rstrip('/')}/{file}" for file in files)


def _take_place(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise


def _unreachable(error: BaseException | None) -> bool:
    """Whether a server was not there, or too busy, rather than of another mind."""
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError | HTTPClientError):
            return True
        answer = getattr(error, "response", None) or {}
        if answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500:
            return True
        error = error.__cause__
    return False


def _said(error: BaseException) -> str:
    """An error's text on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def open_storage(root: str) -> Storage:
    """The store, allowed and proven to work."""
    allowlist.check(Setting.STORES, "store.root", allowlist.on_disk(root))
    try:
        storage = Storage(root)
    except (ValueError, ImportError, OSError) as error:
        raise InputError(f"store.root {root!r} cannot be opened: {error}") from error
    storage.check()
    return storage


def work_folder(storage: Storage) -> Path:
    """Where this machine works on a store. The jobs in it name the store: two stores must not share it."""
    remote = cache() / "work" / digest(storage.uri("").encode())[:16]
    return Path(storage.path(".work")) if storage.local else remote
