"""Where questions come from. `open_source` picks the adapter; `base.py` says what one gives."""

from pathlib import Path

from masters.common.errors import InputError
from masters.config import Data
from masters.config.schema import BUILT_IN
from masters.data.sources.base import RawRow, Source

__all__ = ["RawRow", "Source", "open_source"]

FILE_SUFFIXES = (".jsonl", ".parquet", ".json", ".csv", ".tsv", ".arrow", ".zip")


def open_source(data: Data) -> Source:
    """The source that `data.source` names: one of `BUILT_IN`, an existing file or folder, else a hub id.

    Raises InputError if it is not there, is empty or lacks columns.
    """
    name = data.source
    local = name in BUILT_IN or _exists(name)
    if local and data.revision:
        raise InputError(f"data.revision applies to hub data sets only; source {name} is local: remove data.revision")
    if name in BUILT_IN:
        return _built_in(name)
    if local:
        return _local(Path(name).expanduser())
    if looks_like_path(name):
        raise InputError(f"source not found: expected a file or folder at {name}, found none; correct data.source")
    from masters.data.sources.hugging_face import Hub

    return Hub(name, data.revision)


def _built_in(name: str) -> Source:
    if name == "digits":
        from masters.data.sources.digits import Digits

        return Digits()
    from masters.data.sources.easyvqa import EasyVqa

    return EasyVqa()


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, RuntimeError):  # no possible file name, no such user, no permission to look
        return False


def looks_like_path(name: str) -> bool:
    """Whether a name that is not there was meant as a file or folder rather than a hub id."""
    return name.lower().endswith(FILE_SUFFIXES) or name.startswith((".", "/", "~")) or name.count("/") > 1


def _local(path: Path) -> Source:
    from masters.data.sources.files import Jsonl, Parquet, parquet_files

    if path.is_dir():
        from masters.data.sources.hugging_face import Saved, is_saved

        if is_saved(path):
            return Saved(path)
        if parquet_files(path):
            return Parquet(path)
        raise InputError(
            f"source {path}: expected a folder with .parquet files or one from save_to_disk, found neither"
        )
    if path.suffix.lower() == ".jsonl":
        return Jsonl(path)
    if path.suffix.lower() == ".parquet":
        return Parquet(path)
    raise InputError(
        f"source {path}: expected a .jsonl or .parquet file, found {path.suffix or 'no suffix'}; convert or rename it"
    )
