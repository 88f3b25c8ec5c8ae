"""Sources of the `datasets` library: folders from `save_to_disk`, and data sets of the hub (streamed)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from masters.common.errors import InputError, one_line
from masters.common.hashing import canonical_json, digest, folder_digest
from masters.data.sources.base import COLUMNS, REQUIRED, RawRow, check_columns, content_digest, raw_row
from masters.data.sources.class_labels import name_labels, read_label_names
from masters.data.sources.image_references import resolve_inside
from masters.data.split_names import describe_split_names, find_split

SAVED_FILES = ("dataset_dict.json", "dataset_info.json")  # either one is in a folder from save_to_disk
TIMEOUT = 10  # seconds for the hub to answer


class SavedSource:
    """A Dataset or DatasetDict saved with `save_to_disk`; memory-mapped, images as stored."""

    def __init__(self, folder: Path) -> None:
        import datasets

        self.folder = folder
        _check_inside(folder)
        try:
            loaded: Any = datasets.load_from_disk(str(folder))
        except Exception as error:  # the library raises anything, even for a data set without rows
            raise InputError(
                f"source {folder}: expected a folder with rows from datasets' save_to_disk, found none that loads "
                f"({one_line(error)}); save it again"
            ) from None
        self.parts = _read_parts(loaded, f"source {folder}")
        # images stored as text are files of their own
        self.has_image_paths = any(getattr(part.features["image"], "dtype", "") == "string" for _, part in self.parts)
        if not any(len(part) for _, part in self.parts):
            raise InputError(
                f"source {folder} is empty: expected rows with {', '.join(REQUIRED)}, found none; correct data.source"
            )

    def digest(self) -> str:
        # `map` and the like leave cache files in the folder
        arrow = (path.name for path in self.folder.rglob("*.arrow") if not path.name.startswith("cache-"))
        stored = folder_digest(self.folder, (".json", *arrow))
        return content_digest([["folder", stored]], self.rows() if self.has_image_paths else ())

    def rows(self) -> Iterator[RawRow]:
        try:
            for split, part in self.parts:
                yield from _read_part(part, self.folder, split)
        except Exception as error:
            raise InputError(
                f"source {self.folder} is damaged: expected a data set that can be read to its end, found an error "
                f"({one_line(error)}); copy or save it again"
            ) from None


class HubSource:
    """A data set of the Hugging Face hub, streamed, at the commit that its revision names now."""

    def __init__(self, name: str, revision: str | None) -> None:
        self.where = f"source {name}" + (f" at {revision}" if revision else "")
        self.name = name
        try:
            from datasets import DownloadConfig, load_dataset
            from huggingface_hub import HfApi

            self.commit = HfApi().dataset_info(name, revision=revision, timeout=TIMEOUT).sha
            # a single try: without a network, the error must come at once
            config = DownloadConfig(max_retries=1)
            loaded: Any = load_dataset(name, revision=self.commit, streaming=True, download_config=config)
        except Exception as error:  # the network, the hub and the library raise anything
            raise InputError(
                f"{self.where}: {Path.cwd()} has no such file or folder, and the hub no data set of that name; "
                f"check the name, the revision and the network ({type(error).__name__}: {one_line(error)})"
            ) from None
        self.parts = _read_parts(loaded, self.where)
        if next(self.rows(), None) is None:
            raise InputError(
                f"{self.where} is empty: expected rows with {', '.join(REQUIRED)}, found none; correct data.source"
            )

    def digest(self) -> str:
        return digest(canonical_json({"hub": self.name, "commit": self.commit, "config": "default"}).encode())

    def rows(self) -> Iterator[RawRow]:
        try:
            for split, part in self.parts:
                yield from _read_part(part, None, split)
        except Exception as error:
            raise InputError(f"{self.where} could not be read to the end ({one_line(error)}); run again") from None


def is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in SAVED_FILES)


def _check_inside(folder: Path) -> None:
    """Raise InputError if the data set's lists name files outside its folder, which its digest would not cover."""
    for state in folder.rglob("state.json"):
        try:
            listed = [str(part["filename"]) for part in json.loads(state.read_bytes())["_data_files"]]
            outside = [
                name for name in listed if resolve_inside(folder, state.parent.relative_to(folder) / name) is None
            ]
        except (OSError, ValueError, LookupError, TypeError, RecursionError, RuntimeError) as error:
            raise InputError(
                f"source {folder}: {state.name} lists no data files ({one_line(error)}); save the data set again"
            ) from None
        if not listed and state.parent != folder:
            raise InputError(
                f"source {folder}: {state.parent.relative_to(folder.parent)} has no rows, and datasets loads no such "
                "part: save the data set without it"
            )
        if outside:
            raise InputError(
                f"source {folder}: {state.name} names a file outside the folder ({outside[0]!r:.200}); save the data "
                "set again"
            )


def _read_parts(loaded: Any, where: str) -> list[tuple[str | None, Any]]:
    """Return (split, part) for each part of a data set, images undecoded; split is None if the parts have no names.

    Raises InputError.
    """
    named = dict(loaded) if isinstance(loaded, dict) else {None: loaded}
    unknown = [str(name) for name in named if name is not None and not find_split(str(name))]
    if unknown:
        raise InputError(
            f"{where}: expected parts named {describe_split_names()}; found {', '.join(unknown)}; rename or drop them"
        )
    parts = []
    for name, part in named.items():
        columns = part.column_names or list(next(iter(part), {}))  # a stream may not know its columns
        check_columns(columns, where if name is None else f"{where}, part {name}")
        selected = part.select_columns([column for column in COLUMNS if column in columns])
        parts.append((None if name is None else find_split(str(name)), _without_decoding(selected)))
    return parts


def _read_part(part: Any, root: Path | None, split: str | None) -> Iterator[RawRow]:
    labels = read_label_names(part.features.arrow_schema) if part.features else {}
    return (raw_row(name_labels(row, labels), root, split) for row in part)


def _without_decoding(part: Any) -> Any:
    """Have the library return images, also in lists, as their stored bytes."""
    from datasets import Image, List

    feature = (part.features or {}).get("image")
    if isinstance(feature, Image):
        return part.cast_column("image", Image(decode=False))
    if isinstance(feature, List) and isinstance(feature.feature, Image):
        return part.cast_column("image", List(Image(decode=False)))
    return part
