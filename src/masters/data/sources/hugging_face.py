"""Data sets of the `datasets` library: folders from `save_to_disk`, and the hub (streamed)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from masters.common.errors import InputError
from masters.common.hashing import canonical, digest, folder_digest
from masters.data.sources.base import (
    COLUMNS,
    REQUIRED,
    RawRow,
    content_digest,
    need_columns,
    one_line,
    raw_row,
    resolve_inside,
)

SPLITS = {"train": "train", "test": "test", "validation": "test"}
MARKS = ("dataset_dict.json", "dataset_info.json")  # what save_to_disk leaves in a folder
TIMEOUT = 10  # seconds for the hub to answer at all


class Saved:
    """A Dataset or DatasetDict saved with `save_to_disk`; memory-mapped, images as stored."""

    def __init__(self, folder: Path) -> None:
        import datasets

        self.folder = folder
        _check_inside(folder)
        try:
            loaded: Any = datasets.load_from_disk(str(folder))
        except Exception as error:  # the library raises what it likes, also over a data set without rows
            raise InputError(
                f"source {folder}: expected a folder with rows from datasets' save_to_disk, found none that loads "
                f"({one_line(error)}); save it again"
            ) from None
        self.parts = _parts(loaded, f"source {folder}")
        # images stored as text are files of their own
        self.paths = any(getattr(part.features["image"], "dtype", "") == "string" for _, part in self.parts)
        if not any(len(part) for _, part in self.parts):
            raise InputError(f"source {folder} is empty: expected rows with {', '.join(REQUIRED)}, found none")

    def digest(self) -> str:
        # without the caches that other uses of the folder leave in it
        arrow = (p.name for p in self.folder.rglob("*.arrow") if not p.name.startswith("cache-"))
        found = folder_digest(self.folder, (".json", *arrow))
        return content_digest([["folder", found]], self.rows() if self.paths else ())

    def rows(self) -> Iterator[RawRow]:
        try:
            for split, part in self.parts:
                yield from (raw_row(found, self.folder, split) for found in part)
        except Exception as error:
            raise InputError(f"source {self.folder} is damaged: {one_line(error)}") from None


class Hub:
    """A data set of the Hugging Face hub, streamed, at the commit that its revision means now."""

    def __init__(self, name: str, revision: str | None) -> None:
        self.where = f"source {name}" + (f" at {revision}" if revision else "")
        self.name = name
        try:
            from datasets import DownloadConfig, load_dataset
            from huggingface_hub import HfApi

            self.commit = HfApi().dataset_info(name, revision=revision, timeout=TIMEOUT).sha
            # one try: without a network, the answer must come at once
            config = DownloadConfig(max_retries=1)
            loaded: Any = load_dataset(name, revision=self.commit, streaming=True, download_config=config)
        except Exception as error:  # the network, the hub and the library raise what they like
            raise InputError(
                f"{self.where}: no such file or folder here, and the hub did not give a data set of that name; "
                f"check the name, the revision and the network ({type(error).__name__}: {one_line(error)})"
            ) from None
        self.parts = _parts(loaded, self.where)
        if next(self.rows(), None) is None:
            raise InputError(f"{self.where} is empty: expected rows with {', '.join(REQUIRED)}, found none")

    def digest(self) -> str:
        return digest(canonical({"hub": self.name, "commit": self.commit, "config": "default"}).encode())

    def rows(self) -> Iterator[RawRow]:
        try:
            for split, part in self.parts:
                yield from (raw_row(found, None, split) for found in part)
        except Exception as error:
            raise InputError(f"{self.where} broke off while it was read ({one_line(error)}); run again") from None


def is_saved(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in MARKS)


def _check_inside(folder: Path) -> None:
    """Raises InputError if the data set's own lists name files outside its folder: its digest would not hold them."""
    for state in folder.rglob("state.json"):
        try:
            listed = [str(part["filename"]) for part in json.loads(state.read_bytes())["_data_files"]]
            outside = [
                name for name in listed if resolve_inside(folder, state.parent.relative_to(folder) / name) is None
            ]
        except (OSError, ValueError, LookupError, TypeError, RecursionError, RuntimeError) as error:
            raise InputError(f"source {folder}: {state.name} lists no data files ({one_line(error)})") from None
        if outside:
            raise InputError(f"source {folder}: {state.name} names a file outside the folder ({outside[0]!r:.200})")


def _parts(loaded: Any, where: str) -> list[tuple[str | None, Any]]:
    """(split, part) of a data set with or without named parts; images undecoded. Raises InputError."""
    named = dict(loaded) if isinstance(loaded, dict) else {None: loaded}
    other = [str(name) for name in named if name is not None and name not in SPLITS]
    if other:
        raise InputError(
            f"{where}: expected parts named {', '.join(SPLITS)}; found {', '.join(other)}; rename or drop them"
        )
    parts = []
    for name, part in named.items():
        columns = part.column_names or list(next(iter(part), {}))  # a stream may not know them ahead
        need_columns(columns, where if name is None else f"{where}, part {name}")
        wanted = part.select_columns([c for c in COLUMNS if c in columns])
        parts.append((None if name is None else SPLITS[name], _undecoded(wanted)))
    return parts


def _undecoded(part: Any) -> Any:
    from datasets import Image

    stored = isinstance((part.features or {}).get("image"), Image)
    return part.cast_column("image", Image(decode=False)) if stored else part
