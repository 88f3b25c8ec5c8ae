"""Sources of questions. `open_source` chooses the adapter for `data.source`; `base.py` defines the interface."""

from pathlib import Path

from masters.common.errors import InputError
from masters.config import Data
from masters.config.schema import BUILT_IN_SOURCES
from masters.data.sources.base import RawRow, Source
from masters.data.sources.unsupported_sources import describe_missing, looks_like_uri_or_pattern, unsupported_file

__all__ = ["RawRow", "Source", "open_source"]

FILE_SUFFIXES = (".jsonl", ".parquet", ".json", ".csv", ".tsv", ".arrow", ".zip")


def open_source(data: Data) -> Source:
    """Open what `data.source` names: a built-in source, an existing file or folder, or else a data set of the hub.

    With `data.fetch_images`, images that its rows name by URL are downloaded when they are read. Raises InputError if
    the source does not exist, is empty or lacks columns.
    """
    source = _open_named(data)
    if not data.fetch_images or data.source in BUILT_IN_SOURCES:
        return source
    from masters.data.sources.fetched_images import FetchedImages

    return FetchedImages(source)


def _open_named(data: Data) -> Source:
    name = data.source
    is_local = name in BUILT_IN_SOURCES or _exists(name)
    if is_local and data.revision:
        raise InputError(f"data.revision applies to hub data sets only; source {name} is local: remove data.revision")
    if name in BUILT_IN_SOURCES:
        return _open_built_in(name)
    if is_local:
        return _open_path(Path(name).expanduser())
    if looks_like_path(name):
        raise InputError(describe_missing(name))
    from masters.data.sources.hugging_face import HubSource

    return HubSource(name, data.revision)


def _open_built_in(name: str) -> Source:
    if name == "digits":
        from masters.data.sources.digits import DigitsSource

        return DigitsSource()
    if name == "captions":
        from masters.data.sources.captions import CaptionsSource

        return CaptionsSource()
    from masters.data.sources.easyvqa import EasyVqaSource

    return EasyVqaSource()


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, RuntimeError):  # an impossible file name, no such user, no permission
        return False


def looks_like_path(name: str) -> bool:
    """Return whether a name that does not exist was meant as a file or folder rather than a hub id."""
    is_path = name.lower().endswith(FILE_SUFFIXES) or name.startswith((".", "/", "~")) or name.count("/") > 1
    return is_path or looks_like_uri_or_pattern(name)


def _open_path(path: Path) -> Source:
    from masters.data.sources.files import JsonlSource, ParquetSource, find_parquet_files

    if path.is_dir():
        from masters.data.sources.hugging_face import SavedSource, is_saved

        if is_saved(path):
            return SavedSource(path)
        if find_parquet_files(path):
            return ParquetSource(path)
        lines = sorted(path.glob("*.jsonl"))
        remedy = f"of JSONL name one file, such as {lines[0]}, or join them" if lines else "correct data.source"
        raise InputError(
            f"source {path}: expected a folder with .parquet files or a data set saved with save_to_disk, found "
            f"neither; {remedy}"
        )
    if not path.is_file():
        raise InputError(
            f"source {path}: expected a file or folder, found neither, such as a named pipe, which can be read only "
            "once: write the rows to a file"
        )
    if path.suffix.lower() == ".jsonl":
        return JsonlSource(path)
    if path.suffix.lower() == ".parquet":
        return ParquetSource(path)
    raise unsupported_file(path)
