"""References to images as text in a row: a path inside the data's folder, or a URI (file:, data:, http:)."""

import base64
import re
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

from masters.common.uri_scheme import URI_SCHEME

SCHEME_WITHOUT_SLASHES = re.compile(r"(data|file):", re.IGNORECASE)
FILE_URI = re.compile(r"file:(?://(?P<host>[^/]*)(?=/))?(?P<path>.*)", re.IGNORECASE | re.DOTALL)
DATA_URI = re.compile(r"data:(?P<type>[^,]*),(?P<content>.*)", re.IGNORECASE | re.DOTALL)
LOCAL_HOSTS = ("", "localhost", "127.0.0.1")
WEB_SCHEMES = ("http", "https")


def uri_scheme(reference: str | Path) -> str | None:
    """Return the scheme of a URI in lower case, None for a path."""
    if not isinstance(reference, str):
        return None
    match = SCHEME_WITHOUT_SLASHES.match(reference) or URI_SCHEME.match(reference)
    return match[1].lower() if match else None


def is_web_url(reference: object) -> bool:
    return isinstance(reference, str) and uri_scheme(reference) in WEB_SCHEMES


def file_path(reference: str | Path) -> str | Path | None:
    """Return the path of an image file, None if the reference is a URI of anything but a file on this machine."""
    scheme = uri_scheme(reference)
    if scheme is None:
        return reference
    match = FILE_URI.fullmatch(str(reference)) if scheme == "file" else None
    return unquote(match["path"]) if match and (match["host"] or "").lower() in LOCAL_HOSTS else None


def decode_data_uri(uri: str) -> bytes:
    """Return the content of a data URI. Raises ValueError if it has none."""
    match = DATA_URI.fullmatch(uri)
    if match is None:
        raise ValueError("no comma before the content")
    content = unquote_to_bytes(match["content"])
    if not match["type"].lower().rstrip().endswith(";base64"):
        return content
    packed = b"".join(content.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    return base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)


def resolve_inside(root: Path, path: str | Path) -> Path | None:
    """Return the file that a path names from `root`, None if it lies outside (by "..", a link, or an absolute path)."""
    target = (root / path).resolve()
    return target if target.is_relative_to(root.resolve()) else None


def shown(reference: str | Path, characters: int = 200) -> str:
    """Return a reference for a message: quoted, cut, without the query of a URL, which may hold a signature."""
    text = str(reference)
    if is_web_url(text):
        text = text.partition("?")[0]
    return f"{text!r:.{characters}}"
