"""Recognize errors of a file that cannot grow, however a library reports them. A retry right away cannot help.

Either the disk or the store is full (ENOSPC), or the file would exceed its size limit (EFBIG).
"""

import errno
import re

REMEDY = "make room and run again: what is finished is kept, and the run continues from there"
SIZE_REMEDY = "raise the file size limit (ulimit -f), or use a file system with larger files, and run again"
REMEDIES = {errno.ENOSPC: REMEDY, errno.EFBIG: SIZE_REMEDY}
NUMBERS = {errno.ENOSPC: errno.ENOSPC, errno.EDQUOT: errno.ENOSPC, errno.EFBIG: errno.EFBIG}
# messages of the C library, SQLite, Rust and S3 clients (MinIO, Ceph), for errors without a number
TEXTS = re.compile(
    r"No space left on device|Disk quota exceeded|database or disk is full|\(os error 28\)"
    r"|An error occurred \(\w*(?:StorageFull|InsufficientStorage|QuotaExceeded|507)\)"
)
SIZE_TEXTS = re.compile(r"\(os error 27\)")


def find_errno(error: BaseException | None) -> int | None:
    """Return ENOSPC or EFBIG if an error or one of its causes means that, else None."""
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
    """Return whether an error means that a file cannot grow."""
    return find_errno(error) is not None


def describe(error: BaseException) -> str:
    """Return an error's message, with what to do if a file cannot grow."""
    number = find_errno(error)
    return f"{error}; {REMEDIES[number]}" if number else str(error)
