"""Storage of objects in local folders and S3, through fsspec: atomic writes, exclusive creation, listings."""

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

from masters.common import disk_space
from masters.common.errors import InputError, MastersError, StoreError, Unreachable, one_line
from masters.common.files import check_writable
from masters.common.hashing import digest
from masters.common.machine import CACHE, cache_folder
from masters.config import allowlist
from masters.config.allowlist import Setting

TEMPORARY = re.compile(r"(^|/)\.[^/]+\.[0-9a-f]{8}\.tmp$")  # an unfinished local write
CLIENT_ATTEMPTS = 8  # with growing pauses; together they outlast an outage of half a minute
MAX_CONFLICTS = 20  # attempts to create an object while other writers are in the way
UNFINISHED_AGE = 3600.0  # seconds since its last byte after which an unfinished write counts as abandoned
MAX_THREADS = 8  # concurrent requests to a server, whose responses take most of the time
MAX_REASON = 1000  # characters of a client library's error
P = ParamSpec("P")
R = TypeVar("R")


def _wrap_errors(method: Callable[Concatenate["Storage", P], R]) -> Callable[Concatenate["Storage", P], R]:
    """Convert errors of client libraries to StoreError; a FileNotFoundError stays."""

    @wraps(method)
    def wrapped(self: "Storage", *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except (FileNotFoundError, MastersError):
            raise
        except Exception as error:  # client libraries raise many types
            raise StoreError(f"store {self.uri('')}: {one_line(error, MAX_REASON)}") from error

    return wrapped


class Storage:
    """Objects below one root. Names are relative to it and use forward slashes.

    A reader never sees half an object, even after a power failure: local writes go to a temporary sibling, are flushed
    to disk and renamed; S3 writes appear when they are complete. Listings are not cached, so they show the writes of
    other processes.
    """

    def __init__(self, root: str, retry: bool = True) -> None:
        """Open the store at a URL or path. `retry`: repeat requests to an unreachable S3 store for about a minute."""
        self.fs, base = fsspec.core.url_to_fs(root, **_filesystem_options(root, retry))
        self.base = base.rstrip("/")
        self.local = "file" in _protocols(self.fs)
        if self.local and self.base:  # a store has one name, whichever link or ".." leads to it
            self.base = os.path.realpath(self.base)
        self.s3 = "s3" in _protocols(self.fs)
        self.max_threads = 1 if self.local else MAX_THREADS
        if self.s3:
            self.fs.retries = 2 if retry else 1  # each with CLIENT_ATTEMPTS of the client below
            if not self.base:
                raise ValueError("the URL names no bucket; expected s3://bucket/prefix")

    def path(self, name: str) -> str:
        """Return the path in the file system, without a protocol."""
        return f"{self.base}/{name}" if name else self.base

    def uri(self, name: str) -> str:
        """Return the absolute address: a plain path for local files, else protocol and path."""
        return self.path(name) if self.local else self.fs.unstrip_protocol(self.path(name))

    @_wrap_errors
    def exists(self, name: str) -> bool:
        """Return whether there is an object of this name; a folder is not an object."""
        try:
            return self.fs.info(self.path(name))["type"] == "file"
        except (FileNotFoundError, NotADirectoryError):
            return False

    @_wrap_errors
    def read(self, name: str) -> bytes:
        """Return the content of an object. Raises FileNotFoundError if there is none."""
        return self.fs.cat_file(self.path(name))

    @_wrap_errors
    def digest(self, name: str) -> str:
        """Return the SHA-256 of an object, read in chunks."""
        with self.fs.open(self.path(name), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]

    @_wrap_errors
    def write(self, name: str, data: bytes) -> None:
        """Write or replace a whole object."""
        if self.local:
            with self._sibling(name) as temporary:
                temporary.write_bytes(data)
                _publish(temporary, self.path(name), os.replace)
        else:
            self.fs.pipe_file(self.path(name), data)

    @_wrap_errors
    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless it exists. Returns whether this call wrote it; of concurrent calls one wins.

        If an S3 response is lost, the client repeats the request, and the call that wrote returns False. So compare the
        stored content instead of relying on the result.
        """
        if self.local:
            with self._sibling(name) as temporary:
                temporary.write_bytes(data)
                return _try_create(lambda: _publish(temporary, self.path(name), os.link))
        return _try_create(lambda: self.fs.pipe_file(self.path(name), data, mode="create"))

    @_wrap_errors
    def remove(self, name: str) -> None:
        """Remove an object if it exists."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    @_wrap_errors
    def remove_empty_folders(self, folder: str) -> None:
        """Remove empty local folders from `folder` down; object stores have none."""
        for path, _, _ in os.walk(self.path(folder), topdown=False) if self.local else ():
            with suppress(OSError):  # not empty
                os.rmdir(path)

    @_wrap_errors
    def remove_unfinished_writes(self, folder: str) -> None:
        """Remove temporary files of killed writers below `folder`, once they are an hour old."""
        for path in _list_files(self.path(folder)) if self.local else ():
            with suppress(FileNotFoundError):
                if TEMPORARY.search(path) and time.time() - os.stat(path).st_mtime > UNFINISHED_AGE:
                    os.unlink(path)

    @_wrap_errors
    def names(self, prefix: str) -> list[str]:
        """Return the sorted names of all objects below the folder `prefix`; an empty list if there is none."""
        below = f"{self.path(prefix)}/"
        found = _list_files(below) if self.local else self.fs.find(self.path(prefix))
        # an S3 store may list the folder itself, or markers of folders
        return sorted(
            f[len(self.base) + 1 :]
            for f in found
            if f.startswith(below) and not f.endswith("/") and not TEMPORARY.search(f)
        )

    @_wrap_errors
    def details(self, prefix: str) -> dict[str, tuple[int, float]]:
        """Map each object below the folder `prefix` to its bytes and its last modification in Unix seconds."""
        if not self.local:
            found = self.fs.find(self.path(prefix), detail=True)
            known = {f[len(self.base) + 1 :]: (i["size"], i["LastModified"].timestamp()) for f, i in found.items()}
            return {name: known[name] for name in self.names(prefix) if name in known}
        details = {}
        for name in self.names(prefix):
            with suppress(FileNotFoundError):  # removed meanwhile
                found = os.stat(self.path(name))
                details[name] = (found.st_size, found.st_mtime)
        return details

    @_wrap_errors
    def children(self, prefix: str) -> list[str]:
        """Return the sorted names of the folders directly below `prefix`. S3 stores may list one that was emptied."""
        try:
            entries = self.fs.ls(self.path(prefix), detail=True)
        except FileNotFoundError:
            return []
        return sorted(e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries if e["type"] == "directory")

    @_wrap_errors
    def upload(self, source: Path, name: str) -> None:
        """Copy a local file or folder to `name`."""
        for file in sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]:
            target = f"{name}/{file.relative_to(source).as_posix()}" if source.is_dir() else name
            if self.local:
                with self._sibling(target) as temporary:
                    shutil.copyfile(file, temporary)
                    _publish(temporary, self.path(target), os.replace)
            else:
                self.fs.put_file(str(file), self.path(target))

    @_wrap_errors
    def copy(self, source: str, target: str) -> None:
        """Copy an object inside the store (by a hard link if the file system allows it)."""
        if self.local:
            with self._sibling(target) as temporary:
                try:
                    os.link(self.path(source), temporary)
                except OSError:
                    shutil.copyfile(self.path(source), temporary)
                _publish(temporary, self.path(target), os.replace)
        else:
            self.fs.cp_file(self.path(source), self.path(target))

    @_wrap_errors
    def download(self, name: str, folder: Path) -> Path:
        """Return a local folder with the objects below `name`: the store's if it is local, else copies in `folder`.

        `folder` appears complete or not at all. An existing `folder` is used unchanged, so name it by its content.
        """
        if self.local:
            return Path(self.path(name))
        if folder.is_dir():
            return folder
        names = self.names(name)
        if not names:
            raise FileNotFoundError(f"there are no objects below {self.uri(name)}")
        temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            for found in names:
                target = temporary / found[len(name) + 1 :]
                target.parent.mkdir(parents=True, exist_ok=True)
                self.fs.get_file(self.path(found), str(target))
            _rename_folder(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return folder

    def check(self) -> None:
        """Check, within seconds, that the store can be listed, written, read and created in.

        Raises InputError if it cannot, Unreachable if a server does not answer.
        """
        data = uuid.uuid4().bytes
        name = f".check-{data.hex()}" if self.local else f".check/{data.hex()}"
        try:
            probe = Storage(self.uri(""), retry=False)
            probe.create(name, data)
            overwritten, is_equal = probe.create(name, b"again"), probe.read(name) == data
            is_listed = self.local or name in probe.names(".check")
            probe.remove(name)
        except Exception as error:  # client libraries raise many types
            reason = one_line((error.__cause__ or error) if isinstance(error, StoreError) else error, MAX_REASON)
            hint = "; the endpoint and keys come from the AWS_* environment variables" if self.s3 else ""
            is_unreachable = _is_unreachable(error) and not disk_space.is_full(error)
            kind = Unreachable if is_unreachable else InputError
            raise kind(f"store {self.uri('')} cannot be written and read back: {reason}{hint}") from error
        if overwritten or not is_equal:
            raise InputError(
                f"store {self.uri('')} does not support conditional writes; use a file system or an S3 store that does"
            )
        if not is_listed:
            raise InputError(f"store {self.uri('')} does not list what was just written; use a store that does")

    @contextmanager
    def _sibling(self, name: str) -> Iterator[Path]:
        """Yield a temporary path beside the object `name`, and remove what is left there."""
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def _filesystem_options(root: str, retry: bool) -> dict:
    """Return options for fsspec: no cached listings, and a client made from today's environment variables."""
    options: dict = dict(use_listings_cache=False, skip_instance_cache=True)
    if root.startswith(("s3://", "s3a://")):
        options["session"] = _session()
        timeouts = dict(connect_timeout=5, read_timeout=30) if retry else dict(connect_timeout=3, read_timeout=5)
        options["config_kwargs"] = timeouts | dict(retries=dict(total_max_attempts=CLIENT_ATTEMPTS if retry else 2))
    return options


def _session() -> object:
    """Return an S3 session without the header "Expect: 100-continue": no timeout ends the wait for its response."""
    from aiobotocore.session import AioSession
    from botocore.handlers import add_expect_header

    session = AioSession()
    session.unregister("before-call.s3", add_expect_header)
    return session


def _try_create(write: Callable[[], None]) -> bool:
    """Call `write`, again after conflicts. Returns whether it wrote; False if the object exists."""
    for _ in range(MAX_CONFLICTS):
        try:
            write()
        except FileExistsError:
            return False
        except OSError as error:
            # s3fs raises EINVAL for a refused If-None-Match, and EBUSY during another client's write
            code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
            if code == "PreconditionFailed":
                return False
            if code != "ConditionalRequestConflict":
                raise
        else:
            return True
    raise OSError(f"{MAX_CONFLICTS} attempts conflicted with another writer")


def _publish(temporary: Path, target: str, rename: Callable[[Path, str], None]) -> None:
    """Give a written file its name with `rename`. File and name are on disk when this returns."""
    _flush(temporary)
    rename(temporary, target)
    _flush(Path(target).parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _list_files(folder: str) -> Iterator[str]:
    """Yield the paths of all files below a folder. Folders removed meanwhile are skipped, unreadable ones raise."""

    def on_error(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for path, _, files in os.walk(folder, onerror=on_error):
        yield from (f"{path.rstrip('/')}/{file}" for file in files)


def _rename_folder(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process downloaded it first
            raise


def _is_unreachable(error: BaseException | None) -> bool:
    """Return whether an error means that the server was down or overloaded, rather than that it refused the request."""
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError | HTTPClientError):
            return True
        response = getattr(error, "response", None) or {}
        if response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500:
            return True
        error = error.__cause__
    return False


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def open_storage(root: str) -> Storage:
    """Open the store after checking that it is allowed and works. Raises InputError otherwise."""
    allowlist.check_allowed(Setting.STORES, "store.root", allowlist.absolute_root(root))
    try:
        storage = Storage(root)
    except (ValueError, ImportError, OSError) as error:
        raise InputError(f"store.root {root!r} cannot be opened: {error}") from error
    storage.check()
    if not storage.local:
        folder, remedy = work_folder(storage), f"set {CACHE} or HOME to another folder"
        check_writable(folder, "local files of runs", remedy)
    return storage


def work_folder(storage: Storage) -> Path:
    """Return this machine's work folder for a store. Its job files name the store, so each store has its own."""
    remote = cache_folder() / "work" / digest(storage.uri("").encode())[:16]
    return Path(storage.path(".work")) if storage.local else remote
