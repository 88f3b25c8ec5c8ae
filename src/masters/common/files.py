"""Local files: atomic writes, and how messages name a path."""

import os
import tempfile
import uuid
from pathlib import Path

from masters.common.errors import InputError

ROOM = 2**20  # bytes


def write_atomically(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    """Write or replace a file, text as UTF-8, so that a reader never sees half of it. Creates missing folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def describe_place(path: str | Path) -> str:
    """Return a path for a message; a relative one with the folder in which it was looked for."""
    is_complete = Path(path).is_absolute() or str(path).startswith("~")
    return str(path) if is_complete else f"{path} in the folder {Path.cwd()}"


def check_writable(folder: Path, purpose: str, remedy: str) -> None:
    """Raise InputError if a folder, which is created if it is missing, cannot be written or has no `ROOM` left."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(ROOM))
    except OSError as error:
        reason = "it is not a folder" if isinstance(error, FileExistsError) else error.strerror or error
        raise InputError(f"{folder}, the folder for {purpose}, cannot be written ({reason}): {remedy}") from error
