"""The letter of a multiple-choice answer. Imports no torch."""

import re
import unicodedata

# what an answer is introduced by, the surest first: "The answer is B", "Answer: (b)"; "option B"
INTRODUCED = [
    re.compile(rf"\b(?:{word})\b(?:\s+(?:is|was|would be))?[\s:*]*", re.IGNORECASE)
    for word in ("answer", "option|choice")
]
# the letter before an option's text, or alone: "B", "(b)", "B.", "B. a cat", "**B)** a cat"
LABEL = re.compile(r"[\W_]{0,4}([A-Za-z])(?:[\W_]*$|[.):\]*]+(?=\s|$))")
BRACKETED = re.compile(r"[(\[]([A-Za-z])[)\]]")
# a capital by itself; "A" and "I" are words where a word in small letters follows, but for these
CAPITAL = re.compile(r"(?<![\w'’])(?![AI]\s+(?!(?:is|and|or|nor|but|because)\b)[a-z])([A-Z])(?![\w'’])")
JOINED = re.compile(r"(?:^\s*(?=[A-Z]\W*$)|[,/&]\s*|\b(?:or|and)\s+)([A-Z])(?![\w'’])")  # "B. or C", "A. B"


def same_choice(text: str, reference: str) -> bool:
    """Whether a text names one letter, and it is that of the reference answer.

    The reference is a letter or a letter with its text, as in "B", "(b)", "B. a cat"; no text has the letter of any
    other. A text that names two different letters is wrong.
    """
    label = LABEL.match(_plain(reference))
    return label is not None and letters(text) == {label[1].upper()}


def letters(text: str) -> set[str]:
    """The letters, as capitals, that a text names: after "answer", else after "option" or "choice", else anywhere.

    Within the text of an option ("B. vitamin C") only letters in brackets, or joined to the first ("B, C", "B or C"),
    count.
    """
    plain = _plain(text)
    for introduced in INTRODUCED:
        if named := set[str]().union(*map(_named, introduced.split(plain)[1:])):
            return named
    return _named(plain)


def _named(part: str) -> set[str]:
    if label := LABEL.match(part):
        rest = part[label.end() :]
        return {letter.upper() for letter in (label[1], *BRACKETED.findall(rest), *JOINED.findall(rest))}
    return {letter.upper() for letter in (*CAPITAL.findall(part), *BRACKETED.findall(part))}


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).strip()
