"""Markdown for Prefect's pages. Text of data and models is escaped, so that it is shown and not interpreted."""

import base64
import string
import unicodedata

MAX_LENGTH = 80  # characters
ISOLATED = "\u2068{}\u2069"  # keeps right-to-left text from reordering the text around it


def escape_text(text: str, limit: int = MAX_LENGTH) -> str:
    """Return the text on one line, cut at `limit`, with markup escaped and invisible characters spelled out."""
    line = " ".join(text[:limit].split())
    escaped = "".join(map(_escape_character, line)) + ("…" if len(text) > limit else "")
    return ISOLATED.format(escaped) if escaped else "*(empty)*"


def embed_image(content: bytes, image_format: str, description: str) -> str:
    """Return an image as a data URL inside the page."""
    return f"![{description}](data:image/{image_format};base64,{base64.b64encode(content).decode()})"


def render_table(rows: list[dict[str, str]]) -> str:
    """Return a table whose columns are the keys of the first row. Cells are Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _escape_character(character: str) -> str:
    if character in string.punctuation:
        return f"\\{character}"
    # controls, directional and joining marks, lone surrogates, private and unassigned code points
    if unicodedata.category(character)[0] == "C":
        return f"\\\\u\\{{{ord(character):x}\\}}"
    return character
