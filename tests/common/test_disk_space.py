"""Full disks and size limits are recognized in what the C library, SQLite, Rust and S3 servers report."""

import errno
import resource
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from masters.common import disk_space
from masters.common.errors import StoreError
from masters.store.storage import Storage

MIB = 2**20
LARGE = {"x": torch.zeros(MIB)}  # 4 MiB


@contextmanager
def limit_file_size(size: int) -> Iterator[None]:
    """Let this process write no file of more bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_device_is_recognized() -> None:
    with pytest.raises(OSError) as raised, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    assert disk_space.is_full(raised.value) and disk_space.describe(raised.value).endswith(disk_space.REMEDY)


def test_a_full_database_is_recognized(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "database")
    database.execute("PRAGMA max_page_count = 2")
    with pytest.raises(sqlite3.OperationalError) as raised:
        database.execute("CREATE TABLE t (x)")
        database.execute("INSERT INTO t VALUES (?)", (bytes(MIB),))
    assert disk_space.is_full(raised.value)


def test_a_limit_of_file_sizes_is_no_full_disk(tmp_path: Path) -> None:
    """It is of no use to try again either, but making room is no remedy. Rust reports it without a number."""
    with limit_file_size(MIB):
        for write in (lambda path: path.write_bytes(bytes(2 * MIB)), lambda path: save_file(LARGE, path)):
            with pytest.raises(Exception) as raised:  # noqa: B017
                write(tmp_path / "x.safetensors")
            assert disk_space.is_full(raised.value)
            described = disk_space.describe(raised.value)
            assert described.endswith(disk_space.SIZE_REMEDY) and disk_space.REMEDY not in described


@pytest.mark.parametrize(
    "text",
    [
        "An error occurred (XMinioStorageFull) when calling the PutObject operation: Storage backend has reached",
        "An error occurred (QuotaExceeded) when calling the PutObject operation: Unknown",
        "(sqlite3.OperationalError) database or disk is full",
        "I/O error: No space left on device (os error 28)",
        "I/O error: something in another language (os error 28)",
    ],
)
def test_the_cause_of_an_error_is_recognized_by_its_text(text: str) -> None:
    try:
        raise StoreError("it failed") from RuntimeError(text)
    except StoreError as error:
        assert disk_space.describe(error) == f"it failed; {disk_space.REMEDY}"


@pytest.mark.parametrize(
    "error", [ValueError("no"), OSError(errno.EACCES, "Permission denied"), StoreError("gone"), None]
)
def test_other_errors_are_not_taken_for_a_full_disk(error: Exception | None) -> None:
    assert not disk_space.is_full(error)


def test_a_store_that_cannot_grow_keeps_what_it_has_and_takes_more_when_it_can(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write("a", b"first")
    with limit_file_size(MIB):
        for write in (storage.write, storage.create):
            with pytest.raises(StoreError) as raised:
                write("a" if write == storage.write else "b", bytes(2 * MIB))
            assert disk_space.is_full(raised.value)
    assert storage.names("") == ["a"] and storage.read("a") == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]  # nothing unfinished takes the room
    storage.write("a", bytes(2 * MIB))
    assert storage.read("a") == bytes(2 * MIB)
