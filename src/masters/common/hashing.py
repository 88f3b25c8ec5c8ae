"""Fingerprints and digests: canonical JSON of literals, SHA-256 of bytes, files, folders and models."""

import hashlib
import json
import math
from pathlib import Path

# files that change a model's answers: weights, configuration, tokenizer, processor, chat template, custom code
IDENTITY_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".py")


def canonical_json(value: object) -> str:
    """Return the unique JSON text of a value made of dict, list, str, int, float, bool and None.

    Raises TypeError on any other type, which must not enter an identity by its repr.
    """
    return json.dumps(
        _check_literals(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def fingerprint(value: object) -> str:
    """Return 16 hexadecimal digits (64 bits) that identify `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def digest(data: bytes) -> str:
    """Return the SHA-256 of bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file, read in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: str | Path, suffixes: tuple[str, ...] | None = None) -> str:
    """Return the SHA-256 over the sorted names and contents of a folder's files (those with one of `suffixes`)."""
    root = Path(folder)
    files = sorted(p for p in root.rglob("*") if p.is_file() and (suffixes is None or p.name.endswith(suffixes)))
    return digest(canonical_json([[p.relative_to(root).as_posix(), file_digest(p)] for p in files]).encode())


def model_digest(folder: Path) -> str:
    """Return the SHA-256 of a model folder over the files that change its answers."""
    return folder_digest(folder, IDENTITY_SUFFIXES)


def to_unit_interval(hexadecimal: str) -> float:
    """Map a digest to a number in [0, 1) by its first 13 digits (52 bits, exact in a float)."""
    return int(hexadecimal[:13], 16) / 16**13


def _check_literals(value: object) -> object:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"an identity takes finite numbers only, found {value!r}")
        return int(value) if value.is_integer() else value
    if isinstance(value, list | tuple):
        return [_check_literals(v) for v in value]
    if isinstance(value, dict):
        if not all(isinstance(k, str) for k in value):
            raise TypeError("an identity takes string keys only")
        return {k: _check_literals(v) for k, v in value.items()}
    raise TypeError(f"an identity takes literals only, found {type(value).__name__}")
