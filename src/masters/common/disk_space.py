"""Recognizes that a file cannot grow, however a library reports it: then another try right away is of no use.

The disk or the store is full (ENOSPC), or the file would exceed the limit of its size (EFBIG).
"""

import errno
import re

REMEDY = "make room and run again: what is finished is kept, and the run goes on from there"
SIZE_REMEDY = "raise the limit of a file's size (ulimit -f), or use a file system with larger files, and run again"
REMEDIES = {errno.ENOSPC: REMEDY, errno.EFBIG: SIZE_REMEDY}
NUMBERS = {errno.ENOSPC: errno.ENOSPC, errno.EDQUOT: errno.ENOSPC, errno.EFBIG: errno.EFBIG}
# as the C library, SQLite, Rust, and clients of S3 servers (MinIO, Ceph) write it where there is no number
TEXTS = re.compile(
    r"No space left on device|Disk quota exceeded|database or disk is full|\(os error 28\)"
    r"|An error occurred \(\w*(?:StorageFull|InsufficientStorage|QuotaExceeded|507)\)"
)
SIZE_TEXTS = re.compile(r"\(os error 27\)")


def find_errno(error: BaseException | None) -> int | None:
    """Return ENOSPC or EFBIG if an error, or one that it was raised from, says so; else None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NUMBERS:
            return NUMBERS[error.errno]
        if TEXTS.search(str(error)):
            return errno.ENOSPC
        if SIZE_TEXTS.search(str(error)):
            return errno.EFBIG
        error = error.__cause__ or error.__context__
    return None


def is_full(error: BaseException | None) -> bool:
    """Return whether an error says that a file cannot grow."""
    return find_errno(error) is not None


def describe(error: BaseException) -> str:
    """Return an error's text, with the remedy if a file cannot grow."""
    number = find_errno(error)
    return f"{error}; {REMEDIES[number]}" if number else str(error)
