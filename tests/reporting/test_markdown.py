"""Text of data and models on a Markdown page is shown and not interpreted."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from masters.reporting.markdown import escape_text

PARSER = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable(["table", "strikethrough"])
MARKUP_TEXTS = [
    "<script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "| a | b |\n|---|---|\n| c | d |",
    "# no heading\n\n- no list\n\n```\nno code\n```",
    "![x](http://example.com/x.png) [y](javascript:alert(1)) <https://example.com>",
    "**b** _i_ ~~s~~ `c` &lt;b&gt; &#60;b&#62; \\",
    "\u202egnp.exe \u2066left\u2069 \u200f\u061c",
    "a\x00b\x1b[31mred\x07\x7f\ud800",
    "1. one\n2. two\n    indented",
    "مرحبا بالعالم",
    "$x^2$ :smile: @everyone",
]
texts = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(MARKUP_TEXTS), min_size=1, max_size=3).map(" ".join))


def leaves(markdown: str) -> list[Token]:
    return [leaf for token in PARSER.parse(markdown) for leaf in token.children or []]


def shown(text: str) -> str:
    """Return what a page may show: one line, with invisible characters spelled out, in an isolate."""
    line = " ".join(text.split())
    spelled = (f"\\u{{{ord(c):x}}}" if unicodedata.category(c)[0] == "C" else c for c in line)
    return f"\u2068{''.join(spelled)}\u2069"


@given(texts)
@pytest.mark.parametrize("frame", ["{}", "## {}", "**right**; answer: {}", "| said | next |\n|---|---|\n| {} | end |"])
def test_text_is_shown_unchanged_and_not_interpreted(frame: str, text: str) -> None:
    page = frame.format(escape_text(text, 10_000))
    assert page.encode()  # no lone surrogate is left
    expected = PARSER.parse(frame.format("word"))
    assert [t.type for t in PARSER.parse(page)] == [t.type for t in expected]  # same blocks, same cells
    content = "".join(leaf.content for leaf in leaves(page))
    if text.split():
        assert shown(text) in content
        allowed = {"text", "text_special", "strong_open", "strong_close"}
        assert {leaf.type for leaf in leaves(page)} <= allowed


@given(texts)
def test_control_and_directional_characters_are_escaped(text: str) -> None:
    left = [c for c in escape_text(text, 10_000) if unicodedata.category(c)[0] == "C"]
    assert left in ([], ["\u2068", "\u2069"])


@given(texts)
def test_links_are_not_detected(text: str) -> None:
    assert not re.search(
        r"https?://|www\.|\w@\w", escape_text(f"{text} https://example.com www.example.com a@b.example", 999)
    )


def test_long_text_is_cut_and_empty_text_is_marked() -> None:
    assert escape_text("x" * 200).count("x") == 80
    assert escape_text(" \n") == "*(empty)*"
