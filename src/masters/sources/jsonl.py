"""JSONL: one object a line, images as paths relative to the file and inside its folder."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from masters.errors import InputError
from masters.identity import file_digest
from masters.sources.base import COLUMNS, RawRow, located


class Jsonl:
    def __init__(self, path: Path) -> None:
        self.path = path
        if path.stat().st_size == 0:
            raise InputError(f"data.source {path} is empty: expected one JSON object a line with {', '.join(COLUMNS)}")

    def digest(self) -> str:
        whole = hashlib.sha256(file_digest(self.path).encode())
        for row in self.rows():
            if isinstance(row.image, Path):
                whole.update(file_digest(row.image).encode())
        return whole.hexdigest()

    def rows(self) -> Iterator[RawRow]:
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield self._row(number, line)

    def _row(self, number: int, line: bytes) -> RawRow:
        try:
            found = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            return RawRow(f"line {number}", fault="line is not JSON in UTF-8")
        if not isinstance(found, dict):
            return RawRow(f"line {number}", fault="line is not a JSON object")
        image, fault = located(found.get("image"), self.path.parent)
        return RawRow(
            found.get("id"), image, found.get("question"), found.get("answer"), found.get("split"), found.get("category"), fault
        )
