"""Errors for a `data.source` that is not supported (a URL, a pattern, a file of another format), with what to do."""

import json
import re
import shlex
from pathlib import Path

from masters.common.errors import InputError
from masters.common.files import describe_place
from masters.data.sources.image_references import uri_scheme

EXPECTED = "a JSONL or Parquet file, a folder of Parquet files, a saved datasets folder, or a Hugging Face id"
HUB_URL = re.compile(
    r"(?:hf://|https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)datasets/([\w.-]+/[\w.-]+)", re.IGNORECASE
)
PATTERN = re.compile(r"[*?\[\]]")
PEEKED_BYTES = 1 << 20
ARCHIVES = (".gz", ".zip", ".bz2", ".xz", ".zst", ".tar")
# first bytes of files that are no JSONL whatever their name is, with what they are and what to do
OTHER_CONTENT = {
    b"\xff\xfe": ("text in UTF-16", "save it as UTF-8"),
    b"\xfe\xff": ("text in UTF-16", "save it as UTF-8"),
    b"PAR1": ("a Parquet file", "rename it to .parquet"),
    b"\x1f\x8b": ("a gzip archive", "unpack it"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
}
# reads bytes: the JSON module finds out their encoding, whatever the locale is
ARRAY_TO_LINES = (
    "python3 -c 'import json, sys; [print(json.dumps(row)) for row in json.load(sys.stdin.buffer)]' < {} > {}"
)


def looks_like_uri_or_pattern(name: str) -> bool:
    return bool(uri_scheme(name) or PATTERN.search(name))


def describe_missing(name: str) -> str:
    """Return what was expected instead of a name that is no file, folder or hub id, and what to do."""
    if hub := HUB_URL.match(name):
        return f'source {name}: expected {EXPECTED}, found a URL of the hub; write data.source = "{hub[1]}"'
    if scheme := uri_scheme(name):
        remedy = "write its path" if scheme == "file" else "copy it to this machine and name the copy"
        return f"source {name}: expected {EXPECTED}, found a URI ({scheme}:), which is not supported; {remedy}"
    if PATTERN.search(name):
        return (
            f"source {name}: expected {EXPECTED}, found a pattern, which is not expanded; name the folder: all "
            ".parquet files below it are read"
        )
    return f"source not found: {describe_place(name)}: correct data.source"


def unsupported_file(path: Path) -> InputError:
    """Return the error for a file of a format that is not supported."""
    suffix = path.suffix.lower()
    remedy = "convert it to one of them, with the columns id, image, question, answer"
    if suffix in (".json", ""):
        try:
            beginning = _read_beginning(path)
        except OSError as error:
            return InputError(
                f"source {path}: expected a .jsonl or .parquet file, found one that cannot be read "
                f"({error.strerror}); correct data.source or the file's permissions"
            )
        if beginning.startswith("["):
            return json_array(path)
        if _is_object(beginning.partition("\n")[0]):
            remedy = "it has one JSON object a line: rename it to .jsonl"
    elif suffix in ARCHIVES:
        remedy = "unpack it"
    return InputError(
        f"source {path}: expected a .jsonl or .parquet file, found {path.suffix or 'no suffix'}; {remedy}"
    )


def check_jsonl_content(path: Path, beginning: bytes) -> None:
    """Raise InputError if the first bytes of a .jsonl file are those of another format or encoding."""
    for start, (found, remedy) in OTHER_CONTENT.items():
        if beginning.startswith(start):
            raise InputError(f"source {path}: expected JSON objects in UTF-8, one a line, found {found}; {remedy}")


def json_array(path: Path) -> InputError:
    """Return the error for a file that holds one JSON array, with a command for any folder that converts it."""
    array = path.absolute()
    lines = array.with_name(f"{path.stem}-lines.jsonl")
    command = ARRAY_TO_LINES.format(shlex.quote(str(array)), shlex.quote(str(lines)))
    return InputError(
        f"source {path}: expected a .jsonl or .parquet file, found {path.suffix or 'a file'} with one JSON array; "
        f"convert it to one object a line: {command}"
    )


def _read_beginning(path: Path) -> str:
    if not path.is_file():  # a pipe would be waited for
        return ""
    with path.open("rb") as file:
        return file.read(PEEKED_BYTES).decode(errors="replace").lstrip("\ufeff \t\r\n")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
