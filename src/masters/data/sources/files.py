"""Sources in JSONL and Parquet files, with images as files beside them or as bytes inside."""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from masters.common.errors import InputError, one_line
from masters.common.hashing import file_digest
from masters.config import allowlist
from masters.config.allowlist import Setting
from masters.data.sources.base import (
    COLUMNS,
    REQUIRED,
    RawRow,
    check_columns,
    check_unique_columns,
    content_digest,
    raw_row,
)
from masters.data.sources.class_labels import LabelNames, name_labels, read_label_names
from masters.data.sources.unsupported_sources import check_jsonl_content, json_array
from masters.data.split_names import find_file_splits

BATCH_ROWS = 64  # rows in memory at a time; they hold images
MAX_LINE_BYTES = 16 << 20  # of a JSONL line: images are files of their own
PEEKED_OBJECTS = 100  # JSONL objects read before a column counts as missing


class JsonlSource:
    """A JSONL file with one object per line; image paths are relative to the file. Broken lines give faulty rows."""

    def __init__(self, path: Path) -> None:
        self.path, self.root = path, path.parent
        if not any(self._lines()):
            raise InputError(
                f"source {path} is empty: expected one JSON object per line with {', '.join(REQUIRED)}, found none; "
                "correct data.source"
            )
        check_jsonl_content(path, next(self._lines())[1])
        columns: set[str] = set()
        objects = 0
        for _, found in self._objects():
            if isinstance(found, dict):
                columns |= found.keys()
                objects += 1
            if objects == PEEKED_OBJECTS or columns.issuperset(REQUIRED):
                break
        if self._begins_as_array(objects):
            raise json_array(path)
        if objects:
            check_columns(columns, f"source {path}")

    def _begins_as_array(self, objects: int) -> bool:
        """Return whether the first line begins a JSON array. A whole array among objects is one broken line."""
        _, line = next(self._lines())
        if not line.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
            return False
        _, fault = next(self._objects())
        return not objects or str(fault).startswith("line is not valid JSON")

    def digest(self) -> str:
        return content_digest([[self.path.name, file_digest(self.path)]], self.rows())

    def rows(self) -> Iterator[RawRow]:
        for number, found in self._objects():
            if isinstance(found, dict):
                yield raw_row(found, self.root)
            else:
                yield RawRow(f"line {number}", fault=found)

    def _objects(self) -> Iterator[tuple[int, dict | str]]:
        """Yield each line's number with its object, or with what is wrong with the line."""
        for number, line in self._lines():
            if len(line) > MAX_LINE_BYTES:
                yield number, f"line is too long (limit {MAX_LINE_BYTES} bytes)"
                continue
            try:
                found = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                yield number, "line is not UTF-8"
            except (ValueError, RecursionError) as error:
                yield number, f"line is not valid JSON ({error})"
            else:
                fault = f"line is not an object (found {type(found).__name__})"
                yield number, found if isinstance(found, dict) else fault

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(iter(lambda: _read_line(file), b""), start=1):
                    if line.removeprefix(BOM_UTF8).strip():
                        yield number, line
        except OSError as error:
            raise InputError(
                f"source {self.path}: expected a file that can be read, found an error ({error.strerror}); correct "
                "data.source or the file's permissions"
            ) from None


class ParquetSource:
    """A Parquet file, or all below a folder in order of name. `image` is bytes, {bytes, path}, or a relative path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.base = path if path.is_dir() else path.parent
        self.files = find_parquet_files(path) if path.is_dir() else [path]
        for file in self.files:  # an allowed folder may hold links to other places
            allowlist.check_allowed(Setting.DATA, "data.source", str(file.absolute()))
        rows, has_splits = 0, False
        self.has_image_paths = False  # whether images may be files of their own
        for file in self.files:
            schema, count = _read_footer(file)
            check_columns(schema.names, f"source {file}")
            check_unique_columns(schema.names, f"source {file}")
            image_type = schema.field("image").type
            self.has_image_paths |= not (pa.types.is_binary(image_type) or pa.types.is_large_binary(image_type))
            rows += count
            has_splits |= "split" in schema.names
        names = [file.relative_to(self.base) for file in self.files]
        self.splits = [None] * len(names) if has_splits else find_file_splits(names)
        if not rows:
            raise InputError(
                f"source {path} is empty: expected rows with {', '.join(REQUIRED)}, found none; correct data.source"
            )

    def digest(self) -> str:
        files = [
            [file.relative_to(self.base).as_posix(), file_digest(file), *([split] if split else [])]
            for file, split in zip(self.files, self.splits, strict=True)
        ]
        return content_digest(files, self.rows() if self.has_image_paths else ())

    def rows(self) -> Iterator[RawRow]:
        for file, split in zip(self.files, self.splits, strict=True):
            try:
                with pq.ParquetFile(file) as table:
                    columns = [name for name in COLUMNS if name in table.schema_arrow.names]
                    labels = read_label_names(table.schema_arrow)
                    for batch in table.iter_batches(BATCH_ROWS, columns=columns):
                        yield from _read_batch(batch, file.parent, labels, split)
            except (pa.ArrowException, OSError) as error:
                raise InputError(
                    f"source {file} is damaged: expected a Parquet file that can be read to its end, found an error "
                    f"({one_line(error)}); copy or write it again"
                ) from None


def _read_footer(file: Path) -> tuple[pa.Schema, int]:
    """Return schema and number of rows of a Parquet file."""
    try:
        with pq.ParquetFile(file) as table:
            return table.schema_arrow, table.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"source {file}: expected a Parquet file, found something else ({one_line(error)}); write the file again, "
            "or correct data.source"
        ) from None


def _read_line(file: BinaryIO) -> bytes:
    """Read the next line. A line that is too long is cut one byte above the limit, and its rest is skipped."""
    line = file.readline(MAX_LINE_BYTES + 1)
    rest = line
    while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
        rest = file.readline(MAX_LINE_BYTES + 1)
    return line


def _read_batch(batch: pa.RecordBatch, root: Path, labels: LabelNames, split: str | None) -> Iterator[RawRow]:
    """Yield the rows of a batch. A value that Python cannot hold (invalid UTF-8, an odd date) costs only its row."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):
        rows = (_read_row(batch, number) for number in range(len(batch)))
    for row in rows:
        yield row if isinstance(row, RawRow) else raw_row(name_labels(row, labels), root, split)


def _read_row(batch: pa.RecordBatch, number: int) -> dict | RawRow:
    """Read one row of a batch, with a fault if a value cannot be read."""
    columns, faults = {}, []
    for name in batch.schema.names:
        try:
            columns[name] = batch[name][number].as_py()
        except (ValueError, OverflowError) as error:
            faults.append(f"{name} cannot be read ({one_line(error, 200)})")
    return RawRow(columns.get("id"), fault=faults[0]) if faults else columns


def find_parquet_files(folder: Path) -> list[Path]:
    """Return the Parquet files below a folder. Names with a leading "." or "_" are temporary files of other tools."""
    files = (path for path in folder.rglob("*.parquet") if path.is_file())
    return sorted(path for path in files if not any(part[0] in "._" for part in path.relative_to(folder).parts))
