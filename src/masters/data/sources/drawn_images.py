"""Base of the sources that draw their images when they are read: all rows in memory, images as PNG."""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property

from PIL import Image

from masters.common.hashing import canonical_json, digest
from masters.data.sources.base import RawRow


class DrawnSource(ABC):
    """A source whose rows are made by `draw`, always the same ones. Every image is PNG bytes."""

    @abstractmethod
    def draw(self) -> list[RawRow]:
        """Make all rows."""

    def digest(self) -> str:
        rows = [[row.id, digest(_image_bytes(row)), row.question, row.answer] for row in self._drawn]
        return digest(canonical_json(rows).encode())

    def rows(self) -> Iterator[RawRow]:
        yield from self._drawn

    @cached_property
    def _drawn(self) -> list[RawRow]:
        return self.draw()


def encode_png(picture: Image.Image) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, "PNG")
    return sink.getvalue()


def _image_bytes(row: RawRow) -> bytes:
    assert isinstance(row.image, bytes)
    return row.image
