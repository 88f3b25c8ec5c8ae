"""Errors for a `data.source` that is not read (a URL, a pattern, a file of another format), with what to do."""

import json
import re
import shlex
from pathlib import Path

from masters.common.errors import InputError
from masters.common.files import describe_place

EXPECTED = "a JSONL or Parquet file, a folder of Parquet files, a saved datasets folder, or a Hugging Face id"
SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
HUB_URL = re.compile(
    r"(?:hf://|https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)datasets/([\w.-]+/[\w.-]+)", re.IGNORECASE
)
PATTERN = re.compile(r"[*?\[\]]")
PEEKED_BYTES = 1 << 20
ARRAY_TO_LINES = "python -c 'import json, sys; [print(json.dumps(row)) for row in json.load(sys.stdin)]' < {} > {}"


def describe_missing(name: str) -> str:
    """Return what was expected instead of a name that is no file, folder or hub id, and what to do."""
    if hub := HUB_URL.match(name):
        return f'source {name}: expected {EXPECTED}, found a URL of the hub; write data.source = "{hub[1]}"'
    if scheme := SCHEME.match(name):
        kind = scheme[1].lower()
        remedy = "write its path" if kind == "file" else "copy it to this machine and name the copy"
        return f"source {name}: expected {EXPECTED}; nothing is read from {kind}:// here: {remedy}"
    if PATTERN.search(name):
        return (
            f"source {name}: expected {EXPECTED}, found a pattern, which is not expanded: name the folder, all "
            ".parquet files below it are read"
        )
    return f"source not found: {describe_place(name)}: correct data.source"


def unread_file(path: Path) -> InputError:
    """Return the error for a file of a format that is not read."""
    suffix = path.suffix.lower()
    remedy = "convert it to one of them, with the columns id, image, question, answer"
    if suffix in (".json", ""):
        with path.open("rb") as file:
            beginning = file.read(PEEKED_BYTES).decode(errors="replace").lstrip("\ufeff \t\r\n")
        if beginning.startswith("["):
            return json_array(path)
        if _is_object(beginning.partition("\n")[0]):
            remedy = "it has one JSON object a line: rename it to .jsonl"
    elif suffix in (".gz", ".zip", ".bz2", ".xz", ".zst", ".tar"):
        remedy = "unpack it"
    return InputError(
        f"source {path}: expected a .jsonl or .parquet file, found {path.suffix or 'no suffix'}; {remedy}"
    )


def json_array(path: Path) -> InputError:
    """Return the error for a file that holds one JSON array."""
    command = ARRAY_TO_LINES.format(shlex.quote(path.name), shlex.quote(f"{path.stem}-lines.jsonl"))
    return InputError(
        f"source {path}: expected a .jsonl or .parquet file, found {path.suffix or 'a file'} with one JSON array; "
        f"convert it to one object a line: {command}"
    )


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
