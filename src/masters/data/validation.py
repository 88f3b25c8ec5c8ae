"""Validate raw rows one at a time: an accepted row becomes a question, any other is rejected with a reason.

Nothing in a row can end a run: a broken image, a decompression bomb, a hostile path or a repeated id is a rejection.
"""

import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from masters.common.errors import MastersError
from masters.common.hashing import canonical_json, digest, to_unit_interval
from masters.data.images import MAX_BYTES, find_image_fault
from masters.data.sources.base import RawRow, Source, resolve_inside

SPLITS = ("train", "test")
TEST_SHARE = 0.1  # of the images, if rows name no split
MAX_CHARACTERS = {"id": 1_000, "question": 20_000, "answer": 10_000, "category": 1_000}
MAX_ANSWERS = 100  # accepted answers of a question
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


def validate_rows(source: Source, special_tokens: tuple[str, ...] = ()) -> Iterator[dict | RejectedRow]:
    """Yield for every row of the source, in order, a question (a row of `tables.QUESTIONS`) or a rejection.

    A text with one of `special_tokens` is rejected: in a prompt it could end a turn or stand for a second image. Memory
    holds one row and the ids of all accepted rows.
    """
    seen_ids: set[str] = set()
    for number, row in enumerate(source.rows(), start=1):
        try:
            yield _validate_row(row, seen_ids, special_tokens)
        except MastersError:
            raise
        except RowError as error:
            yield RejectedRow(_display_id(row, number), error.kind, error.reason)
        except Exception as error:  # no row may end a run
            kind = "row cannot be processed"
            detail = f"{type(error).__name__}: {str(error)[:SHOWN_CHARACTERS]}"
            yield RejectedRow(_display_id(row, number), kind, f"{kind} ({detail})")


def _validate_row(row: RawRow, seen_ids: set[str], special_tokens: tuple[str, ...]) -> dict:
    """Return the question of a row, and add its id to `seen_ids`. Raises RowError if the row is rejected."""
    if row.fault:
        kind, _, detail = row.fault.partition(" (")
        raise RowError(kind, detail.removesuffix(")") or None)
    question_id = parse_id(row.id)
    if question_id in seen_ids:
        raise RowError("duplicate id")
    question, answers = parse_text("question", row.question), parse_answers(row.answer)
    for name, text in (("question", question), *(("answer", answer) for answer in answers)):
        if found := next((token for token in special_tokens if token in text), None):
            raise RowError(f"{name} has a special token", found)
    category = parse_category(row.category)
    if row.split is not None and row.split not in SPLITS:
        raise RowError("unknown split", f"found {row.split!r:.50}, expected train or test")
    image, image_digest = read_image(row)
    if fault := find_image_fault(image, image_digest):
        raise RowError(*fault)
    seen_ids.add(question_id)
    return question_row(question_id, question, answers, image, image_digest, row.split, category)


def parse_row(row: RawRow) -> dict:
    """Return the question of a row that was accepted before, without decoding its image again."""
    image, image_digest = read_image(row)
    question, answers = parse_text("question", row.question), parse_answers(row.answer)
    category = parse_category(row.category)
    return question_row(parse_id(row.id), question, answers, image, image_digest, row.split, category)


def question_row(
    question_id: str,
    question: str,
    answers: list[str],
    image: bytes,
    image_digest: str,
    split: object,
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
    """Return an id as text; a whole number becomes its decimal digits. Raises RowError."""
    if value is None or value == "":
        raise RowError("id is missing")
    return parse_text("id", str(value) if isinstance(value, int) and not isinstance(value, bool) else value)


def parse_answers(value: object) -> list[str]:
    """Return the answers of a row, a text or a list of texts, without repetitions. The first is the one to learn.

    Raises RowError.
    """
    if not isinstance(value, list):
        return [parse_text("answer", value)]
    if not value:
        raise RowError("answer is an empty list")
    if len(value) > MAX_ANSWERS:
        raise RowError("answer is too long a list", f"{len(value)} texts, limit {MAX_ANSWERS}")
    return list(dict.fromkeys(parse_text("answer", answer) for answer in value))


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
    return None if value is None or value == "" else parse_text("category", value)


def read_image(row: RawRow) -> tuple[bytes, str]:
    """Return the stored bytes of a row's image and their SHA-256. Raises RowError."""
    image = row.image
    if image is None or image == "":
        raise RowError("image is missing")
    if isinstance(image, bytes):
        if len(image) > MAX_BYTES:
            raise RowError("image is too large", f"{len(image)} bytes, limit {MAX_BYTES}")
        return image, digest(image)
    if not isinstance(image, str | Path):
        raise RowError("image is neither bytes nor a path", f"found {type(image).__name__}")
    if row.root is None:
        raise RowError("image is a path", "this source has no folder; expected bytes")
    return _read_file(row.root, str(image))


@lru_cache(maxsize=2)  # consecutive rows often name the same image
def _read_file(root: Path, path: str) -> tuple[bytes, str]:
    shown_path = f"{path!r:.{SHOWN_CHARACTERS}}"
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
        raise RowError("image file not found", shown_path) from None
    except (OSError, ValueError, RuntimeError) as error:  # no permission, an impossible name, a loop of links
        raise RowError("image file cannot be read", f"{shown_path}: {str(error)[:SHOWN_CHARACTERS]}") from None
    return data, digest(data)


def _display_id(row: RawRow, number: int) -> str:
    """Return what the rejected table calls a row: its id, or its number if the id is not usable."""
    if isinstance(row.id, str | int) and not isinstance(row.id, bool) and row.id != "":
        return str(row.id)[:SHOWN_CHARACTERS].encode(errors="backslashreplace").decode()
    return f"row {number}"
