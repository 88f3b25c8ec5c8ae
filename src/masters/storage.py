"""One small door to files and S3: whole-object writes, exclusive creation, listings. Everything goes through fsspec."""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from masters.errors import InputError


class Storage:
    """Objects below one root. Paths are relative to it and use forward slashes.

    A reader never sees half an object: local writes go to a sibling name first and are renamed, S3 writes appear
    when they are complete.
    """

    def __init__(self, root: str) -> None:
        self.fs, base = fsspec.core.url_to_fs(root)
        self.base = base.rstrip("/")
        self.local = "file" in _protocols(self.fs)

    def path(self, name: str) -> str:
        return f"{self.base}/{name}" if name else self.base

    def uri(self, name: str) -> str:
        """Absolute: a plain path for local files, protocol and path otherwise."""
        return self.path(name) if self.local else self.fs.unstrip_protocol(self.path(name))

    def exists(self, name: str) -> bool:
        return self.fs.exists(self.path(name))

    def read(self, name: str) -> bytes:
        return self.fs.cat_file(self.path(name))

    def write(self, name: str, data: bytes) -> None:
        """Write or replace a whole object."""
        if self.local:
            with self._sibling(name) as temporary:
                temporary.write_bytes(data)
                os.replace(temporary, self.path(name))
        else:
            self.fs.pipe_file(self.path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless it is there. Returns whether this call wrote it; one of several racers wins."""
        if self.local:
            with self._sibling(name) as temporary:
                temporary.write_bytes(data)
                return _created(lambda: os.link(temporary, self.path(name)))
        return _created(lambda: self.fs.pipe_file(self.path(name), data, mode="create"))

    def remove(self, name: str) -> None:
        """Remove an object if it is there."""
        if self.exists(name):
            self.fs.rm_file(self.path(name))

    def names(self, prefix: str) -> list[str]:
        """Names of all objects below `prefix`, sorted; empty if there is none."""
        found = self.fs.find(self.path(prefix)) if self.fs.exists(self.path(prefix)) else []
        return sorted(f[len(self.base) + 1 :] for f in found if not f.endswith("/"))

    def children(self, prefix: str) -> list[str]:
        """Names of the folders directly below `prefix`, sorted."""
        if not self.fs.exists(self.path(prefix)):
            return []
        entries = self.fs.ls(self.path(prefix), detail=True)
        return sorted(e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries if e["type"] == "directory")

    def upload(self, source: Path, name: str) -> None:
        """Copy a local file or folder to `name`."""
        for file in sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]:
            target = f"{name}/{file.relative_to(source).as_posix()}" if source.is_dir() else name
            if self.local:
                with self._sibling(target) as temporary:
                    shutil.copyfile(file, temporary)
                    os.replace(temporary, self.path(target))
            else:
                self.fs.put_file(str(file), self.path(target))

    def copy(self, source: str, target: str) -> None:
        """Copy an object inside the store (a hard link where files allow it)."""
        if self.local:
            with self._sibling(target) as temporary:
                try:
                    os.link(self.path(source), temporary)
                except OSError:
                    shutil.copyfile(self.path(source), temporary)
                os.replace(temporary, self.path(target))
        else:
            self.fs.cp_file(self.path(source), self.path(target))

    def download(self, name: str, folder: Path) -> Path:
        """A local folder with the objects below `name`: the objects themselves if the store is local."""
        if self.local:
            return Path(self.path(name))
        for found in self.names(name):
            target = folder / found[len(name) + 1 :]
            target.parent.mkdir(parents=True, exist_ok=True)
            self.fs.get_file(self.path(found), str(target))
        return folder

    def check(self) -> None:
        """Prove that the store can be written, read and created in exclusively. Raises InputError."""
        name = f".check-{uuid.uuid4().hex}"
        try:
            first, second = self.create(name, b"masters"), self.create(name, b"again")
            right = self.read(name) == b"masters"
            self.fs.rm_file(self.path(name))
        except Exception as error:  # the client libraries raise what they like
            raise InputError(f"store {self.uri('')} cannot be written and read back: {error}") from error
        if not (first and not second and right):
            raise InputError(
                f"store {self.uri('')} does not honour conditional writes; use a file system or an S3 store that does"
            )

    @contextmanager
    def _sibling(self, name: str) -> Iterator[Path]:
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def _created(write: Callable[[], None]) -> bool:
    try:
        write()
    except FileExistsError:
        return False
    except OSError as error:
        # s3fs reports a refused If-None-Match as EINVAL with the code in the text
        if "PreconditionFailed" in str(error) or "pre-conditions" in str(error):
            return False
        raise
    return True


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
