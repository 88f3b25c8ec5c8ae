"""From raw rows to the questions table: every row is accepted or set aside with a reason; none stops the run."""

import io
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from masters.identity import canonical, digest, unit_interval
from masters.sources import RawRow, Source

PIXELS = 64_000_000  # larger images are not decoded
ASPECT = 200  # the Qwen processors refuse longer ones
IMAGE_BYTES = 256 << 20
QUESTION_LENGTH, ANSWER_LENGTH = 20_000, 10_000
SPLITS = ("train", "test")
HELD_OUT = 0.1  # of the images, where the data names no split


@dataclass(frozen=True)
class Rejected:
    id: str
    reason: str


class _Fault(Exception):
    """Why a row is set aside."""


def validated(source: Source) -> Iterator[dict | Rejected]:
    """A questions-table row or a rejection per raw row, streamed. Ids seen are all that is kept."""
    seen: set[str] = set()
    for raw in source.rows():
        try:
            row = question(raw)
            if row["question_id"] in seen:
                raise _Fault("duplicate id")
            seen.add(row["question_id"])
            yield row
        except _Fault as fault:
            yield Rejected(str(raw.id)[:200], str(fault))


def question(raw: RawRow) -> dict:
    """The checked row. Raises _Fault."""
    if raw.fault:
        raise _Fault(raw.fault)
    identifier = _identifier(raw.id)
    asked = _text("question", raw.question, QUESTION_LENGTH)
    answer = _text("answer", raw.answer, ANSWER_LENGTH)
    image, image_digest = _image(raw.image)
    if raw.split is not None and raw.split not in SPLITS:
        raise _Fault(f"split is neither train nor test (found {str(raw.split)[:40]!r})")
    split = raw.split or ("test" if unit_interval(image_digest) < HELD_OUT else "train")
    content = digest(canonical([asked, answer, image_digest]).encode())
    return dict(
        question_id=identifier, question_digest=content, image=image, question=asked, answer=answer, split=split,
        category=None if raw.category is None else str(raw.category)[:200],
    )  # fmt: skip


def chosen(keys: Iterable[tuple[str, str, str]], limits: dict[str, int | None]) -> set[str]:
    """Ids kept under the limits of (id, digest, split): the smallest hashes, so growing data moves few."""
    by_split: dict[str, list[tuple[str, str]]] = {}
    for identifier, content, split in keys:
        by_split.setdefault(split, []).append((digest(f"{content}/{identifier}".encode()), identifier))
    return {identifier for split, found in by_split.items() for _, identifier in sorted(found)[: limits[split]]}


def _identifier(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise _Fault("id is missing or not text")
    text = str(value)
    if len(text) > 500 or not text.isprintable():
        raise _Fault("id is over 500 characters or not printable")
    return text


def _text(name: str, value: Any, longest: int) -> str:
    if value is None:
        raise _Fault(f"{name} is missing")
    if not isinstance(value, str):
        raise _Fault(f"{name} is not text (found {type(value).__name__})")
    if not value.strip():
        raise _Fault(f"{name} is empty")
    if len(value) > longest:
        raise _Fault(f"{name} is over {longest:,} characters")
    if any(ord(c) < 32 and c not in "\n\r\t" or 0xD800 <= ord(c) < 0xE000 for c in value):
        raise _Fault(f"{name} holds control characters")
    return value


def _image(image: bytes | Path | None) -> tuple[bytes, str]:
    """The image's bytes and their digest. Neighbouring rows often share an image: a path is read once."""
    if image is None or image == b"":
        raise _Fault("image is missing")
    return _from_path(image) if isinstance(image, Path) else _checked(image)


@lru_cache(maxsize=8)
def _from_path(path: Path) -> tuple[bytes, str]:
    try:
        if path.stat().st_size > IMAGE_BYTES:
            raise _Fault(f"image is over {IMAGE_BYTES >> 20} MiB")
        data = path.read_bytes()
    except OSError as error:
        raise _Fault(f"image cannot be read ({error.strerror})") from error
    return _checked(data)


@lru_cache(maxsize=8)
def _checked(data: bytes) -> tuple[bytes, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as opened:
                width, height = opened.size
                if not width or not height or width * height > PIXELS:
                    raise _Fault(f"image has {width} x {height} pixels; at most {PIXELS:,} are decoded")
                if max(width, height) > ASPECT * min(width, height):
                    raise _Fault(f"image is {width} x {height}: its sides differ by more than {ASPECT} times")
                opened.convert("RGB").load()
    except _Fault:
        raise
    except Exception as error:  # decoders raise what they like; each means the same
        raise _Fault("image cannot be decoded") from error
    return data, digest(data)
