"""Validate raw rows one at a time: an accepted row becomes a question, any other is rejected with a reason.

Nothing in a row can end a run: a broken image, a decompression bomb, a hostile path or a repeated id is a rejection.
"""

import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from pathlib import Path

from masters.common.errors import MastersError, one_line
from masters.common.hashing import canonical_json, digest, to_unit_interval
from masters.data.image_placeholders import remove_placeholders
from masters.data.images import MAX_BYTES, find_image_fault
from masters.data.number_text import number_to_text
from masters.data.sources.base import RawRow, Source
from masters.data.sources.image_references import (
    decode_data_uri,
    file_path,
    is_web_url,
    resolve_inside,
    shown,
    uri_scheme,
)
from masters.data.split_names import describe_split_names, find_split

PLACEHOLDER_REMOVED = "image placeholder removed from the question"
TEST_SHARE = 0.1  # of the images, if rows name no split
MAX_CHARACTERS = {"id": 1_000, "question": 20_000, "answer": 10_000, "category": 1_000}
MAX_ANSWERS = 100  # accepted answers of a question
BASE64_STARTS, MIN_BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR"), 64  # PNG, JPEG, GIF, WebP; characters
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # all but tab, line feed, carriage return
SURROGATE = re.compile(r"[\ud800-\udfff]")
SHOWN_CHARACTERS = 200  # of a value that a reason or the rejected table quotes


class RowError(Exception):
    """A row is rejected. `kind` is the same for every such row, `detail` is about this one."""

    def __init__(self, kind: str, detail: object = None) -> None:
        self.kind = kind
        self.reason = kind if detail is None else f"{kind} ({detail})"
        super().__init__(self.reason)


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A rejected row: its id or place, the countable kind of rejection, and the full reason."""

    id: str
    kind: str
    reason: str


def validate_rows(
    source: Source, special_tokens: tuple[str, ...] = (), changes: Counter[str] | None = None
) -> Iterator[dict | RejectedRow]:
    """Yield for every row of the source, in order, a question (a row of `tables.QUESTIONS`) or a rejection.

    A text with one of `special_tokens` is rejected: in a prompt it could end a turn or stand for a second image. Memory
    holds one row and the ids of all accepted rows. `changes`: counts what was changed in accepted rows.
    """
    seen_ids: set[str] = set()
    for number, row in enumerate(source.rows(), start=1):
        try:
            question = _validate_row(row, seen_ids, special_tokens)
            if changes is not None and question["question"] != row.question:
                changes[PLACEHOLDER_REMOVED] += 1
            yield question
        except MastersError:
            raise
        except RowError as error:
            yield RejectedRow(_display_id(row, number), error.kind, error.reason)
        except Exception as error:  # no row may end a run
            kind = "row cannot be processed"
            detail = f"{type(error).__name__}: {one_line(error, SHOWN_CHARACTERS)}"
            yield RejectedRow(_display_id(row, number), kind, f"{kind} ({detail})")


def _validate_row(row: RawRow, seen_ids: set[str], special_tokens: tuple[str, ...]) -> dict:
    """Return the question of a row, and add its id to `seen_ids`. Raises RowError if the row is rejected."""
    if row.fault:
        kind, _, detail = row.fault.partition(" (")
        raise RowError(kind, detail.removesuffix(")") or None)
    question_id = parse_id(row.id)
    if question_id in seen_ids:
        raise RowError("duplicate id")
    question, answers = parse_question(row.question), parse_answers(row.answer)
    for name, text in (("question", question), *(("answer", answer) for answer in answers)):
        if found := next((token for token in special_tokens if token in text), None):
            raise RowError(f"{name} has a special token", found)
    category, split = parse_category(row.category), parse_split(row.split)
    image, image_digest = read_image(row)
    if fault := find_image_fault(image, image_digest):
        raise RowError(*fault)
    seen_ids.add(question_id)
    return question_row(question_id, question, answers, image, image_digest, split, category)


def parse_row(row: RawRow) -> dict:
    """Return the question of a row that was accepted before, without decoding its image again."""
    image, image_digest = read_image(row)
    question, answers = parse_question(row.question), parse_answers(row.answer)
    category, split = parse_category(row.category), parse_split(row.split)
    return question_row(parse_id(row.id), question, answers, image, image_digest, split, category)


def question_row(
    question_id: str,
    question: str,
    answers: list[str],
    image: bytes,
    image_digest: str,
    split: str | None,
    category: str | None,
) -> dict:
    """Make a row of `questions`. If the row names no split, the image decides, so no image is in both splits."""
    answer, *others = answers
    if split is None:
        split = "test" if to_unit_interval(image_digest) < TEST_SHARE else "train"
    content = [question, answer, image_digest, *([others] if others else [])]
    return dict(
        question_id=question_id,
        question_digest=digest(canonical_json(content).encode()),
        image_digest=image_digest,
        image=image,
        question=question,
        answer=answer,
        accepted_answers=answers,
        split=split,
        category=category,
    )


def parse_id(value: object) -> str:
    """Return an id as text; whole numbers and decimals become their digits. Raises RowError."""
    if number_to_text(value) in (None, ""):
        raise RowError("id is missing")
    is_exact = isinstance(value, int | Decimal) or (isinstance(value, float) and value % 1 == 0)
    return parse_text("id", number_to_text(value) if is_exact and not isinstance(value, bool) else value)


def parse_question(value: object) -> str:
    """Return a question without image placeholders. Raises RowError, also if they stand for several images."""
    question, images = remove_placeholders(parse_text("question", value))
    if images > 1:
        raise RowError("question has placeholders of several images", f"{images}, a row has one image")
    return parse_text("question", question)


def parse_answers(value: object) -> list[str]:
    """Return the answers of a row as texts, without repetitions: one, or all of a list. The first is the one to learn.

    Numbers and truth values become texts (`number_to_text`). Raises RowError.
    """
    if not isinstance(value, list):
        return [parse_text("answer", number_to_text(value))]
    if not value:
        raise RowError("answer is an empty list")
    if len(value) > MAX_ANSWERS:
        raise RowError("answer is too long a list", f"{len(value)} texts, limit {MAX_ANSWERS}")
    return list(dict.fromkeys(parse_text("answer", number_to_text(answer)) for answer in value))


def parse_split(value: object) -> str | None:
    """Return "train" or "test", None if the row names no split. Raises RowError for an unknown name."""
    if number_to_text(value) in (None, ""):
        return None
    if (split := find_split(value)) is None:
        raise RowError("unknown split", f"found {value!r:.50}, expected {describe_split_names()}")
    return split


def parse_text(name: str, value: object) -> str:
    """Return a text unchanged if it can be stored and shown to a model. Raises RowError otherwise."""
    if value is None:
        raise RowError(f"{name} is missing")
    if not isinstance(value, str):
        raise RowError(f"{name} is not text", f"found {type(value).__name__}")
    if not value.strip():
        raise RowError(f"{name} is empty")
    if len(value) > MAX_CHARACTERS[name]:
        raise RowError(f"{name} is too long", f"{len(value)} characters, limit {MAX_CHARACTERS[name]}")
    if control := CONTROL.search(value):
        raise RowError(f"{name} has control characters", f"U+{ord(control[0]):04X} at {control.start()}")
    if SURROGATE.search(value):
        raise RowError(f"{name} is not valid Unicode")
    return value


def parse_category(value: object) -> str | None:
    """Return the optional category. Raises RowError if it is not a valid text."""
    text = number_to_text(value)
    return None if text is None or text == "" else parse_text("category", text)


def read_image(row: RawRow) -> tuple[bytes, str]:
    """Return the stored bytes of a row's image and their SHA-256. Raises RowError."""
    image = row.image
    if image is None or image == "":
        raise RowError("image is missing")
    if isinstance(image, bytes):
        if len(image) > MAX_BYTES:
            raise RowError("image is too large", f"{len(image)} bytes, limit {MAX_BYTES}")
        return image, digest(image)
    if isinstance(image, list):
        raise RowError("image is a list", f"of {len(image)}; expected one image a row")
    if isinstance(image, dict):
        names = ", ".join(map(str, image))[:SHOWN_CHARACTERS] or "nothing"
        raise RowError("image is neither bytes nor a path", f"found dict with {names}; expected bytes or path in it")
    if not isinstance(image, str | Path):
        raise RowError("image is neither bytes nor a path", f"found {type(image).__name__}")
    if str(image).startswith(BASE64_STARTS) and len(str(image)) > MIN_BASE64:
        raise RowError("image is base64 without a prefix", "write data:image/png;base64, before it")
    path = file_path(image)
    if path is None:
        return _read_uri(str(image))
    if row.root is None:
        raise RowError("image is a path", "this source has no folder; expected bytes")
    return _read_file(row.root, str(path))


def _read_uri(uri: str) -> tuple[bytes, str]:
    """Return the content of a data URI and its SHA-256. Raises RowError for all other URIs: they are not read here."""
    if is_web_url(uri):
        remedy = "set data.fetch_images = true, or download it and name the file"
        raise RowError("image is a URL", f"{shown(uri)}; {remedy}")
    if uri_scheme(uri) != "data":
        raise RowError(
            "image is a URI that is not read", f"{shown(uri)}; expected a path, file:///, data: or http(s)://"
        )
    if len(uri) > MAX_BYTES * 3:  # percent encoding takes three characters a byte
        raise RowError("image is too large", f"{len(uri)} characters, limit {MAX_BYTES * 3}")
    try:
        data = decode_data_uri(uri)
    except ValueError as error:
        raise RowError("image is a broken data URI", f"{shown(uri, 60)}: {error}") from None
    if len(data) > MAX_BYTES:
        raise RowError("image is too large", f"{len(data)} bytes, limit {MAX_BYTES}")
    return data, digest(data)


@lru_cache(maxsize=2)  # consecutive rows often name the same image
def _read_file(root: Path, path: str) -> tuple[bytes, str]:
    shown_path = shown(path)
    try:
        target = resolve_inside(root, path)
        if target is None:
            raise RowError("image path leaves the data folder", shown_path)
        status = target.stat()
        if not stat.S_ISREG(status.st_mode):
            raise RowError("image is not a file", shown_path)
        if status.st_size > MAX_BYTES:
            raise RowError("image is too large", f"{status.st_size} bytes, limit {MAX_BYTES}")
        data = target.read_bytes()
    except FileNotFoundError:
        hint = "; write / for \\" if "\\" in path else ""
        raise RowError("image file not found", f"{shown_path}{hint}") from None
    except (OSError, ValueError, RuntimeError) as error:  # no permission, an impossible name, a loop of links
        raise RowError("image file cannot be read", f"{shown_path}: {one_line(error, SHOWN_CHARACTERS)}") from None
    return data, digest(data)


def _display_id(row: RawRow, number: int) -> str:
    """Return what the rejected table calls a row: its id, or its number if the id is not usable."""
    text = None if isinstance(row.id, bool) else number_to_text(row.id)
    if isinstance(text, str) and text:
        return text[:SHOWN_CHARACTERS].encode(errors="backslashreplace").decode()
    return f"row {number}"
