"""Identity by content: canonical JSON of literals, SHA-256 of it, and digests of files, folders and models."""

import hashlib
import json
import math
from pathlib import Path

BLOCK = 1 << 20
# what changes a model's answers: weights, configuration, tokenizer, processor, chat template, code of its own
IDENTITY_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".py")


def canonical(value: object) -> str:
    """The one JSON text of a value made of dict, list, str, int, float, bool and None.

    Raises TypeError on anything else: a new type must not slip into an identity by its repr.
    """
    return json.dumps(_checked(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: object) -> str:
    """16 hexadecimal digits (64 bits) that name an artifact made from `value`."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


def digest(data: bytes) -> str:
    """SHA-256 of bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: str | Path, suffixes: tuple[str, ...] | None = None) -> str:
    """SHA-256 over the names and contents of a folder's files (those with one of `suffixes`), sorted by name."""
    root = Path(folder)
    files = sorted(p for p in root.rglob("*") if p.is_file() and (suffixes is None or p.name.endswith(suffixes)))
    return digest(canonical([[p.relative_to(root).as_posix(), file_digest(p)] for p in files]).encode())


def model_digest(folder: Path) -> str:
    """Identity of a model folder, by content."""
    return folder_digest(folder, IDENTITY_SUFFIXES)


def unit_interval(hexadecimal: str) -> float:
    """A number in [0, 1) from the first 13 digits (52 bits, exact in a float) of a digest."""
    return int(hexadecimal[:13], 16) / 16**13


def _checked(value: object) -> object:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"identity takes finite numbers only, found {value!r}")
        return int(value) if value.is_integer() else value
    if isinstance(value, list | tuple):
        return [_checked(v) for v in value]
    if isinstance(value, dict):
        if not all(isinstance(k, str) for k in value):
            raise TypeError("identity takes string keys only")
        return {k: _checked(v) for k, v in value.items()}
    raise TypeError(f"identity takes literals only, found {type(value).__name__}")
