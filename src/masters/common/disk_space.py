"""Recognizes that a disk or a store is full, however a library reports it: then another try right away is of no use."""

import errno
import re

REMEDY = "make room and run again: what is finished is kept, and the run goes on from there"
NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# as the C library, SQLite, Rust, and clients of S3 servers (MinIO, Ceph) write it where there is no number
TEXTS = re.compile(
    r"No space left on device|Disk quota exceeded|database or disk is full|\(os error (?:27|28)\)"
    r"|An error occurred \(\w*(?:StorageFull|InsufficientStorage|QuotaExceeded|507)\)"
)


def is_full(error: BaseException | None) -> bool:
    """Return whether an error, or one that it was raised from, says that no space is left for a file."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in NUMBERS) or TEXTS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def describe(error: BaseException) -> str:
    """Return an error's text, with the remedy if the disk or the store is full."""
    return f"{error}; {REMEDY}" if is_full(error) else str(error)
