"""Validation of raw rows, one at a time: what is accepted becomes a question, what is not gets a reason.

Nothing in a row can end a run: a broken image, a bomb, a hostile path or an id seen before is a rejection.
"""

import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from masters.common.errors import MastersError
from masters.common.hashing import canonical, digest, unit_interval
from masters.data.images import MAX_BYTES, image_fault
from masters.data.sources.base import RawRow, Source, resolve_inside

SPLITS = ("train", "test")
HELD_OUT = 0.1  # of the images, where a row names no split
LIMITS = {"id": 1_000, "question": 20_000, "answer": 10_000, "category": 1_000}  # characters
MOST_ANSWERS = 100  # accepted answers of a question
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # all but tab, line feed, carriage return
SURROGATE = re.compile(r"[\ud800-\udfff]")
SHOWN = 200  # characters of an unacceptable id that the rejected table keeps


class Reject(Exception):
    """A row is refused. `kind` is countable; `detail` is about this row."""

    def __init__(self, kind: str, detail: object = None) -> None:
        self.kind = kind
        self.reason = kind if detail is None else f"{kind} ({detail})"
        super().__init__(self.reason)


@dataclass(frozen=True, slots=True)
class Rejected:
    id: str
    kind: str
    reason: str


def validated(source: Source, special_tokens: tuple[str, ...] = ()) -> Iterator[dict | Rejected]:
    """For every row of the source, in order: a question (see `schemas.QUESTIONS`) or a rejection.

    A text that holds one of `special_tokens` is refused: in a prompt it would be a turn's end or a second image.

    Memory holds one row, and the ids seen.
    """
    seen: set[str] = set()
    for number, row in enumerate(source.rows(), start=1):
        try:
            yield _accepted(row, seen, special_tokens)
        except MastersError:
            raise
        except Reject as reject:
            yield Rejected(_shown_id(row, number), reject.kind, reject.reason)
        except Exception as error:  # one row never ends a run
            kind = "row cannot be processed"
            yield Rejected(_shown_id(row, number), kind, f"{kind} ({type(error).__name__}: {str(error)[:SHOWN]})")


def _accepted(row: RawRow, seen: set[str], special_tokens: tuple[str, ...]) -> dict:
    """The question of a row. Its id counts as seen only if the row is accepted. Raises Reject."""
    if row.fault:
        kind, _, detail = row.fault.partition(" (")
        raise Reject(kind, detail.removesuffix(")") or None)
    question_id = identifier(row.id)
    if question_id in seen:
        raise Reject("duplicate id")
    question, answers = text("question", row.question), accepted_answers(row.answer)
    for name, value in (("question", question), *(("answer", answer) for answer in answers)):
        if found := next((token for token in special_tokens if token in value), None):
            raise Reject(f"{name} has a special token", found)
    category = category_of(row)
    if row.split is not None and row.split not in SPLITS:
        raise Reject("unknown split", f"found {row.split!r:.50}, expected train or test")
    image, image_digest = image_of(row)
    if fault := image_fault(image, image_digest):
        raise Reject(*fault)
    seen.add(question_id)
    return question_row(question_id, question, answers, image, image_digest, row.split, category)


def question_row(
    question_id: str,
    question: str,
    answers: list[str],
    image: bytes,
    image_digest: str,
    split: object,
    category: str | None,
) -> dict:
    """One row of `questions`. Without a split, the image decides: it is never both trained and evaluated on."""
    answer, *others = answers
    if split is None:
        split = "test" if unit_interval(image_digest) < HELD_OUT else "train"
    content = digest(canonical([question, answer, image_digest, *([others] if others else [])]).encode())
    return dict(
        question_id=question_id, question_digest=content, image_digest=image_digest, image=image, question=question,
        answer=answer, accepted_answers=answers, split=split, category=category,
    )  # fmt: skip


def reread(row: RawRow) -> dict:
    """The question of a row that was accepted before, without judging its image again."""
    image, image_digest = image_of(row)
    question, answers, category = text("question", row.question), accepted_answers(row.answer), category_of(row)
    return question_row(identifier(row.id), question, answers, image, image_digest, row.split, category)


def identifier(value: object) -> str:
    """An id as text; whole numbers count as their decimals. Raises Reject."""
    if value is None or value == "":
        raise Reject("id is missing")
    return text("id", str(value) if isinstance(value, int) and not isinstance(value, bool) else value)


def accepted_answers(value: object) -> list[str]:
    """The answers of a row, a text or a list of texts, each once; the first is the one to learn. Raises Reject."""
    if not isinstance(value, list):
        return [text("answer", value)]
    if not value:
        raise Reject("answer is an empty list")
    if len(value) > MOST_ANSWERS:
        raise Reject("answer is too long a list", f"{len(value)} texts, limit {MOST_ANSWERS}")
    return list(dict.fromkeys(text("answer", answer) for answer in value))


def text(name: str, value: object) -> str:
    """A text that can be kept and shown to a model, unchanged. Raises Reject."""
    if value is None:
        raise Reject(f"{name} is missing")
    if not isinstance(value, str):
        raise Reject(f"{name} is not text", f"found {type(value).__name__}")
    if not value.strip():
        raise Reject(f"{name} is empty")
    if len(value) > LIMITS[name]:
        raise Reject(f"{name} is too long", f"{len(value)} characters, limit {LIMITS[name]}")
    if found := CONTROL.search(value):
        raise Reject(f"{name} has control characters", f"U+{ord(found[0]):04X} at {found.start()}")
    if SURROGATE.search(value):
        raise Reject(f"{name} is not valid Unicode")
    return value


def category_of(row: RawRow) -> str | None:
    """An optional text. Raises Reject."""
    return None if row.category is None or row.category == "" else text("category", row.category)


def image_of(row: RawRow) -> tuple[bytes, str]:
    """An image's bytes, as they are, and their SHA-256. Raises Reject."""
    image = row.image
    if image is None or image == "":
        raise Reject("image is missing")
    if isinstance(image, bytes):
        if len(image) > MAX_BYTES:
            raise Reject("image is too large", f"{len(image)} bytes, limit {MAX_BYTES}")
        return image, digest(image)
    if not isinstance(image, str | Path):
        raise Reject("image is neither bytes nor a path", f"found {type(image).__name__}")
    if row.root is None:
        raise Reject("image is a path", "this source has no folder; expected bytes")
    # a table of contents may name an image in many rows one after the other
    return _read(row.root, str(image))


@lru_cache(maxsize=2)
def _read(root: Path, path: str) -> tuple[bytes, str]:
    try:
        target = resolve_inside(root, path)
        if target is None:
            raise Reject("image path leaves the data folder", f"{path!r:.{SHOWN}}")
        found = target.stat()
        if not stat.S_ISREG(found.st_mode):
            raise Reject("image is not a file", f"{path!r:.{SHOWN}}")
        if found.st_size > MAX_BYTES:
            raise Reject("image is too large", f"{found.st_size} bytes, limit {MAX_BYTES}")
        data = target.read_bytes()
    except FileNotFoundError:
        raise Reject("image file not found", f"{path!r:.{SHOWN}}") from None
    except (OSError, ValueError, RuntimeError) as error:  # no permission, no possible name, a loop of links
        raise Reject("image file cannot be read", f"{path!r:.{SHOWN}}: {str(error)[:SHOWN]}") from None
    return data, digest(data)


def _shown_id(row: RawRow, number: int) -> str:
    """What the rejected table calls a row: its id, or its place where the id cannot serve."""
    if isinstance(row.id, str | int) and not isinstance(row.id, bool) and row.id != "":
        return str(row.id)[:SHOWN].encode(errors="backslashreplace").decode()
    return f"row {number}"
