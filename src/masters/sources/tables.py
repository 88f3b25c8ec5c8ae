"""Parquet files, saved `datasets` folders and hub data sets: the same columns, images as bytes, paths or pictures."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from masters.errors import InputError
from masters.identity import canonical, digest, file_digest
from masters.sources.base import COLUMNS, RawRow, located

BATCH = 64  # rows decoded at a time


class Parquet:
    """A Parquet file, or a folder of them."""

    def __init__(self, path: Path) -> None:
        self.files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
        self.folder = path.parent if path.is_file() else path
        if not self.files:
            raise InputError(f"data.source {path}: expected Parquet files in the folder, found none")
        for file in self.files:
            try:
                names = parquet.read_schema(file).names
            except Exception as error:  # pyarrow raises its own kinds and OSError
                raise InputError(f"data.source {file} is not a Parquet file: {error}") from error
            check_columns(names, str(file))

    def digest(self) -> str:
        parts = [file_digest(file) for file in self.files]
        parts += [file_digest(row.image) for row in self.rows() if isinstance(row.image, Path)]
        return digest(canonical(parts).encode())

    def rows(self) -> Iterator[RawRow]:
        for file in self.files:
            opened = parquet.ParquetFile(file)
            wanted = [n for n in opened.schema_arrow.names if n in (*COLUMNS, "split", "category")]
            for batch in opened.iter_batches(BATCH, columns=wanted):
                yield from (table_row(row, self.folder) for row in batch.to_pylist())


class SavedDataset:
    """A folder written by `datasets.save_to_disk`."""

    def __init__(self, path: Path) -> None:
        from datasets import DatasetDict, load_from_disk

        self.path = path
        try:
            loaded = load_from_disk(str(path))
        except Exception as error:
            raise InputError(f"data.source {path} is not a saved datasets folder: {error}") from error
        self.parts = dict(loaded) if isinstance(loaded, DatasetDict) else {None: loaded}
        for part in self.parts.values():
            check_columns(part.column_names, str(path))

    def digest(self) -> str:
        files = sorted(p for p in self.path.rglob("*") if p.is_file() and p.suffix in (".arrow", ".json"))
        return digest(canonical([[p.relative_to(self.path).as_posix(), file_digest(p)] for p in files]).encode())

    def rows(self) -> Iterator[RawRow]:
        for split, part in self.parts.items():
            yield from dataset_rows(part, split, self.path)


class HubDataset:
    """A data set on the Hugging Face hub, streamed at a fixed commit."""

    def __init__(self, name: str, revision: str | None) -> None:
        from datasets import load_dataset
        from huggingface_hub import HfApi

        try:
            self.commit = HfApi().dataset_info(name, revision=revision, timeout=10).sha
            self.parts = load_dataset(name, revision=self.commit, streaming=True)
        except Exception as error:  # the hub's client raises many kinds; each means the same to the user
            raise InputError(
                f"data.source {name!r} is neither a file, a folder nor a data set reachable on the hub ({type(error).__name__})"
            ) from error
        self.name = name
        for part in self.parts.values():
            check_columns(part.column_names or [], name)

    def digest(self) -> str:
        return digest(canonical([self.name, self.commit]).encode())

    def rows(self) -> Iterator[RawRow]:
        for split, part in self.parts.items():
            yield from dataset_rows(part, split, Path())


def check_columns(names: Iterable[str], where: str) -> None:
    lacking = [c for c in COLUMNS if c not in set(names)]
    if lacking:
        raise InputError(f"data.source {where} lacks columns {', '.join(lacking)}; found {', '.join(names)}")


def dataset_rows(part: Any, split: str | None, folder: Path) -> Iterator[RawRow]:
    """Rows of a `datasets` data set with its pictures undecoded; its split counts where the rows name none."""
    from datasets import Image

    if isinstance((part.features or {}).get("image"), Image):
        part = part.cast_column("image", Image(decode=False))
    for row in part:
        named = {"validation": "test", "eval": "test"}.get(split or "", split)
        yield table_row(row | {"split": row.get("split") or named}, folder)


def table_row(row: dict, folder: Path) -> RawRow:
    image, fault = picture(row.get("image"), folder)
    return RawRow(row.get("id"), image, row.get("question"), row.get("answer"), row.get("split"), row.get("category"), fault)


def picture(value: Any, folder: Path) -> tuple[bytes | Path | None, str | None]:
    """Bytes as they are, the bytes or path of a {bytes, path} pair, or a path below the data's folder."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value, None
    return located(value, folder)
