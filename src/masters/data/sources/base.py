"""What every source gives: raw rows, untrusted and unchecked, and a digest of the content behind them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from masters.common.errors import InputError
from masters.common.hashing import canonical, digest, file_digest

REQUIRED = ("id", "image", "question", "answer")
COLUMNS = (*REQUIRED, "split", "category")


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as found. Every value may be anything; `masters.data.validation` decides what is accepted.

    `image` is bytes, or a path relative to `root` that must not leave it. `fault` says why a row could not even be
    read (a broken line); then only `id`, which names the place, is set.
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
    """A data set that can be read more than once, always in the same order."""

    def digest(self) -> str:
        """SHA-256 of the content: rows and images. The same place with other content has another digest."""
        ...

    def rows(self) -> Iterator[RawRow]:
        """All rows, streamed."""
        ...


def raw_row(found: Mapping, root: Path | None, split: str | None = None) -> RawRow:
    """A row from columns; a split of its own goes before that of the part of the source it lies in."""
    own = found.get("split")
    return RawRow(
        found.get("id"), image_value(found.get("image")), found.get("question"), found.get("answer"),
        split if own is None else own, found.get("category"), root,
    )  # fmt: skip


def image_value(value: object) -> object:
    """Bytes or path out of Hugging Face's {bytes, path}; anything else as it is."""
    if isinstance(value, dict):
        return value["path"] if value.get("bytes") is None and "path" in value else value.get("bytes")
    return value


def need_columns(columns: Iterable[str], where: str) -> None:
    """Raises InputError naming the columns that are not there."""
    found = sorted(columns)
    missing = [name for name in REQUIRED if name not in found]
    if missing:
        raise InputError(
            f"{where}: expected columns {', '.join(REQUIRED)}; found {', '.join(found) or 'none'}; "
            f"add or rename: {', '.join(missing)}"
        )


def once_each(columns: Iterable[str], where: str) -> None:
    """Raises InputError if a column that is read is there more than once: which one is meant?"""
    found = list(columns)
    twice = [name for name in COLUMNS if found.count(name) > 1]
    if twice:
        raise InputError(f"{where}: expected each column once, found several named {', '.join(twice)}; drop the others")


def one_line(error: BaseException) -> str:
    """What a library says went wrong, fit for an error line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def resolve_inside(root: Path, path: str | Path) -> Path | None:
    """The file that a relative path names below `root`; None if the path leaves it (absolute, "..", a link out)."""
    if Path(path).is_absolute() or ".." in Path(path).parts:
        return None
    target = (root / path).resolve()
    return target if target.is_relative_to(root.resolve()) else None


def content_digest(files: list[list[str]], rows: Iterable[RawRow]) -> str:
    """SHA-256 over [name, digest] of the data files and of every image file that rows name, each once."""
    seen: set[str] = set()
    images = []
    for row in rows:
        if isinstance(row.image, str | Path) and row.root is not None and str(row.image) not in seen:
            seen.add(str(row.image))
            images.append([digest(f"{row.image}".encode(errors="surrogatepass")), _image_digest(row.root, row.image)])
    return digest(canonical([files, sorted(images)]).encode())


def _image_digest(root: Path, path: str | Path) -> str:
    """An image that cannot be read is content too: its row is rejected, and accepted once the file is there."""
    try:
        target = resolve_inside(root, path)
        return file_digest(target) if target and target.is_file() else "none"
    except (OSError, ValueError, RuntimeError):  # unreadable, no possible file name, a loop of links
        return "none"
