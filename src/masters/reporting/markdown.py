"""Text of data and models inside Markdown, as Prefect's pages render it: it is shown and never interpreted."""

import base64
import string
import unicodedata

SHOWN = 80  # characters
ISOLATED = "\u2068{}\u2069"  # text that runs right to left turns nothing around it


def inert(text: str, limit: int = SHOWN) -> str:
    """The text on one line, cut at `limit`: no markup, link or tag in it works; what is invisible is spelt out."""
    line = " ".join(text[:limit].split())
    shown = "".join(map(_visible, line)) + ("…" if len(text) > limit else "")
    return ISOLATED.format(shown) if shown else "*(empty)*"


def picture(content: bytes, kind: str, what: str) -> str:
    """An image inside the page."""
    return f"![{what}](data:image/{kind};base64,{base64.b64encode(content).decode()})"


def table(rows: list[dict[str, str]]) -> str:
    """Cells are Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _visible(character: str) -> str:
    if character in string.punctuation:
        return f"\\{character}"
    # controls, marks that turn or join text, lone surrogates, private and unassigned code points
    if unicodedata.category(character)[0] == "C":
        return f"\\\\u\\{{{ord(character):x}\\}}"
    return character
