"""JSONL and Parquet, with images beside them or inside."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from masters.errors import InputError
from masters.identity import file_digest
from masters.sources.base import COLUMNS, REQUIRED, RawRow, content_digest, need_columns, one_line, raw_row

BATCH = 64  # rows held at a time; they carry images
PEEK = 100  # JSONL objects looked at before a column counts as absent


class Jsonl:
    """One object a line; `image` is a path relative to the file. Broken lines become faulty rows, never a crash."""

    def __init__(self, path: Path) -> None:
        self.path, self.root = path, path.parent
        if not any(self._lines()):
            raise InputError(f"source {path} is empty: expected one JSON object a line with {', '.join(REQUIRED)}")
        columns: set[str] = set()
        objects = 0
        for _, found in self._objects():
            if isinstance(found, dict):
                columns |= found.keys()
                objects += 1
            if objects == PEEK or columns.issuperset(REQUIRED):
                break
        if objects:
            need_columns(columns, f"source {path}")

    def digest(self) -> str:
        return content_digest([[self.path.name, file_digest(self.path)]], self.rows())

    def rows(self) -> Iterator[RawRow]:
        for number, found in self._objects():
            if isinstance(found, dict):
                yield raw_row(found, self.root)
            else:
                yield RawRow(f"line {number}", fault=found)

    def _objects(self) -> Iterator[tuple[int, dict | str]]:
        """Line numbers with objects, or with what is wrong with the line."""
        for number, line in self._lines():
            try:
                found = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                yield number, "line is not UTF-8"
            except (ValueError, RecursionError) as error:
                yield number, f"line is not valid JSON ({error})"
            else:
                yield (
                    number,
                    found if isinstance(found, dict) else f"line is not an object (found {type(found).__name__})",
                )

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield number, line
        except OSError as error:
            raise InputError(f"source {self.path} cannot be read: {error.strerror}") from None


class Parquet:
    """A Parquet file or all below a folder, in order of name. `image`: bytes, {bytes, path}, or a relative path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.base = path if path.is_dir() else path.parent
        self.files = parquet_files(path) if path.is_dir() else [path]
        rows = 0
        self.paths = False  # whether images may be files of their own
        for file in self.files:
            schema, count = self._footer(file)
            need_columns(schema.names, f"source {file}")
            kind = schema.field("image").type
            self.paths |= not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
            rows += count
        if not rows:
            raise InputError(f"source {path} is empty: expected rows with {', '.join(REQUIRED)}, found none")

    def digest(self) -> str:
        files = [[f.relative_to(self.base).as_posix(), file_digest(f)] for f in self.files]
        return content_digest(files, self.rows() if self.paths else ())

    def rows(self) -> Iterator[RawRow]:
        for file in self.files:
            try:
                with pq.ParquetFile(file) as table:
                    columns = [name for name in COLUMNS if name in table.schema_arrow.names]
                    for batch in table.iter_batches(BATCH, columns=columns):
                        yield from (raw_row(found, file.parent) for found in batch.to_pylist())
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"source {file} is damaged: {one_line(error)}") from None

    @staticmethod
    def _footer(file: Path) -> tuple[pa.Schema, int]:
        try:
            with pq.ParquetFile(file) as table:
                return table.schema_arrow, table.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"source {file}: expected a Parquet file, found something else ({one_line(error)})"
            ) from None


def parquet_files(folder: Path) -> list[Path]:
    """Parquet files below a folder; names with a leading "." or "_" are other tools' leftovers."""
    found = (p for p in folder.rglob("*.parquet") if p.is_file())
    return sorted(p for p in found if not any(part[0] in "._" for part in p.relative_to(folder).parts))
