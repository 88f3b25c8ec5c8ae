"""The interface of a source: raw rows, which are untrusted and not validated, and a digest of its content."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from masters.common.errors import InputError
from masters.common.hashing import canonical_json, digest, file_digest
from masters.data.number_text import number_to_text
from masters.data.sources.image_references import file_path, resolve_inside

REQUIRED = ("id", "image", "question", "answer")
COLUMNS = (*REQUIRED, "split", "category")
# where other formats have what a column holds; docs/own-data.md says how to convert them
COUNTERPARTS = {
    "id": ("question_id", "qid", "uid", "index", "idx"),
    "image": ("images", "image_path", "image_url", "img", "picture", "file_name"),
    "question": ("prompt", "query", "problem", "instruction", "conversations", "messages"),
    "answer": ("answers", "label", "response", "solution", "ground_truth", "reward_model", "conversations", "messages"),
}


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as the source stores it. A value may have any type; `masters.data.row_validation` accepts or rejects it.

    `image` is bytes, a path from `root` that must stay inside it, or a URI (`image_references`). `fault` says why a row
    could not be read at all (a broken line); then only `id`, which names the row's place, is set.
    """

    id: object
    image: object = None  # bytes, str or Path; anything else is rejected
    question: object = None
    answer: object = None
    split: object = None
    category: object = None
    root: Path | None = None
    fault: str | None = None


class Source(Protocol):
    """A data set that can be read repeatedly, always in the same order."""

    def digest(self) -> str:
        """Return a SHA-256 of the content, rows and images: changed content has another digest."""
        ...

    def rows(self) -> Iterator[RawRow]:
        """Yield all rows, without holding them in memory."""
        ...


def raw_row(columns: Mapping, root: Path | None, split: str | None = None) -> RawRow:
    """Make a row from its columns. `split`: of the data set's part; the row's own split takes precedence."""
    row_split = columns.get("split")
    return RawRow(
        id=columns.get("id"),
        image=unwrap_image(columns.get("image")),
        question=columns.get("question"),
        answer=columns.get("answer"),
        split=split if number_to_text(row_split) in (None, "") else row_split,
        category=columns.get("category"),
        root=root,
    )


def unwrap_image(value: object) -> object:
    """Return the bytes or the path of Hugging Face's {bytes, path}, also in a list of one; other values unchanged."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | bytes | dict):
        value = value[0]
    if not isinstance(value, dict) or value.keys().isdisjoint(("bytes", "path")):
        return value
    return value["path"] if value.get("bytes") is None and "path" in value else value.get("bytes")


def check_columns(columns: Iterable[str], where: str) -> None:
    """Raise InputError if a required column is missing."""
    found = sorted(columns)
    missing = [name for name in REQUIRED if name not in found]
    if missing:
        similar = {name: next((other for other in COUNTERPARTS[name] if other in found), None) for name in missing}
        hints = ", ".join(f"{name} may be in {other}" for name, other in similar.items() if other)
        raise InputError(
            f"{where}: expected columns {', '.join(REQUIRED)}; found {', '.join(found) or 'none'}"
            f"{f' ({hints})' if hints else ''}; add or rename: {', '.join(missing)}"
        )


def check_unique_columns(columns: Iterable[str], where: str) -> None:
    """Raise InputError if several columns have the name of one that is read."""
    found = list(columns)
    repeated = [name for name in COLUMNS if found.count(name) > 1]
    if repeated:
        raise InputError(
            f"{where}: expected each column once, found several named {', '.join(repeated)}; keep one of each name"
        )


def content_digest(files: list[list[str]], rows: Iterable[RawRow]) -> str:
    """Return a SHA-256 over [name, digest] of the data files and of every image file that rows name."""
    seen: set[str] = set()
    images = []
    for row in rows:
        path = file_path(row.image) if isinstance(row.image, str | Path) else None
        if path is not None and row.root is not None and str(path) not in seen:
            seen.add(str(path))
            images.append([digest(f"{path}".encode(errors="surrogatepass")), _image_digest(row.root, path)])
    return digest(canonical_json([files, sorted(images)]).encode())


def _image_digest(root: Path, path: str | Path) -> str:
    """Return the image file's digest, "none" if it cannot be read: once it can be, the source's content has changed."""
    try:
        target = resolve_inside(root, path)
        return file_digest(target) if target and target.is_file() else "none"
    except (OSError, ValueError, RuntimeError):  # unreadable, an impossible file name, a loop of links
        return "none"
