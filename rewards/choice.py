"""Verifier for multiple-choice answers: compares the option's letter. Imports no torch."""

import re
import unicodedata

# words before an answer, the most certain first: "The answer is B", "Answer: (b)"; "option B"
INTRODUCTIONS = [
    re.compile(rf"\b(?:{word})\b(?:\s+(?:is|was|would be))?[\s:*]*", re.IGNORECASE)
    for word in ("answer", "option|choice")
]
# the letter before an option's text, or alone: "B", "(b)", "B.", "B. a cat", "**B)** a cat"
LABEL = re.compile(r"[\W_]{0,4}([A-Za-z])(?:[\W_]*$|[.):\]*]+(?=\s|$))")
BRACKETED = re.compile(r"[(\[]([A-Za-z])[)\]]")
# a capital by itself; "A" and "I" before a word in small letters are words, unless it is one of these
CAPITAL = re.compile(r"(?<![\w'’])(?![AI]\s+(?!(?:is|and|or|nor|but|because)\b)[a-z])([A-Z])(?![\w'’])")
JOINED = re.compile(r"(?:^\s*(?=[A-Z]\W*$)|[,/&]\s*|\b(?:or|and)\s+)([A-Z])(?![\w'’])")  # "B. or C", "A. B"


def is_same_choice(text: str, reference: str) -> bool:
    """Return whether a text names exactly one letter, and that letter is the reference answer's.

    The reference is a letter or a letter with its text, as in "B", "(b)", "B. a cat". With any other reference the
    result is False. A text that names two different letters is wrong.
    """
    label = LABEL.match(_clean(reference))
    return label is not None and named_letters(text) == {label[1].upper()}


def named_letters(text: str) -> set[str]:
    """Return the letters, as capitals, that a text names: after "answer", else after "option" or "choice", else
    anywhere.

    Within an option's text ("B. vitamin C") only letters in brackets count, and letters joined to the first ("B, C",
    "B or C").
    """
    cleaned = _clean(text)
    for introduction in INTRODUCTIONS:
        if letters := set[str]().union(*map(_letters_of_part, introduction.split(cleaned)[1:])):
            return letters
    return _letters_of_part(cleaned)


def _letters_of_part(part: str) -> set[str]:
    if label := LABEL.match(part):
        rest = part[label.end() :]
        return {letter.upper() for letter in (label[1], *BRACKETED.findall(rest), *JOINED.findall(rest))}
    return {letter.upper() for letter in (*CAPITAL.findall(part), *BRACKETED.findall(part))}


def _clean(text: str) -> str:
    return unicodedata.normalize("NFKC", text).strip()
