"""JSONL and Parquet, with images beside them or inside."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from masters.common.errors import InputError
from masters.common.hashing import file_digest
from masters.config import allowlist
from masters.config.allowlist import Setting
from masters.data.sources.base import (
    COLUMNS,
    REQUIRED,
    RawRow,
    content_digest,
    need_columns,
    once_each,
    one_line,
    raw_row,
)

BATCH = 64  # rows held at a time; they carry images
LINE = 16 << 20  # bytes of a JSONL line: images are files of their own
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
            if len(line) > LINE:
                yield number, f"line is too long (limit {LINE} bytes)"
                continue
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
                for number, line in enumerate(iter(lambda: _line(file), b""), start=1):
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
        for file in self.files:  # a folder that is allowed may hold links that lead elsewhere
            allowlist.check(Setting.DATA, "data.source", str(file.absolute()))
        rows = 0
        self.paths = False  # whether images may be files of their own
        for file in self.files:
            schema, count = self._footer(file)
            need_columns(schema.names, f"source {file}")
            once_each(schema.names, f"source {file}")
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
                        yield from _rows(batch, file.parent)
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


def _line(file: BinaryIO) -> bytes:
    """The next line; of one beyond LINE its beginning, a byte too long, the rest passed over."""
    line = file.readline(LINE + 1)
    rest = line
    while len(rest) > LINE and not rest.endswith(b"\n"):
        rest = file.readline(LINE + 1)
    return line


def _rows(batch: pa.RecordBatch, root: Path) -> Iterator[RawRow]:
    """Rows of a batch. A value that Python cannot hold (no UTF-8, a date of another age) costs its row alone."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):
        rows = (_row(batch, number) for number in range(len(batch)))
    for found in rows:
        yield found if isinstance(found, RawRow) else raw_row(found, root)


def _row(batch: pa.RecordBatch, number: int) -> dict | RawRow:
    found, faults = {}, []
    for name in batch.schema.names:
        try:
            found[name] = batch[name][number].as_py()
        except (ValueError, OverflowError) as error:
            faults.append(f"{name} cannot be read ({one_line(error)})")
    return RawRow(found.get("id"), fault=faults[0]) if faults else found


def parquet_files(folder: Path) -> list[Path]:
    """Parquet files below a folder; names with a leading "." or "_" are other tools' leftovers."""
    found = (p for p in folder.rglob("*.parquet") if p.is_file())
    return sorted(p for p in found if not any(part[0] in "._" for part in p.relative_to(folder).parts))
