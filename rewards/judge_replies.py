"""Parsers of a judge's replies: they skip its thoughts and read a score where the reply leaves no doubt about it."""

import re

# of what is read as a score. 2: thoughts are skipped; decorated scores and scores in a sentence are read. 3: thoughts
# between special tokens are skipped, special tokens behind a verdict are ignored
VERSION = 3
MAX_NUMBERS = 8  # a reply that names more than these is no score

_NAME = "(?:[a-z]+:)?(?:think|thinking|thoughts?|thought_process|reasoning|reflection|scratchpad)"
_CHANNEL = rf"<\|channel\|?>\s*(?:analysis|{_NAME})\b(?:\s*<\|message\|>)?"  # of gpt-oss and Gemma
_OPENING = rf"(?:<\s*{_NAME}\s*>|\[{_NAME}\]|◁{_NAME}▷|<\|(?:begin_of_|start_)?{_NAME}\|>|{_CHANNEL})"
_FINAL_CHANNEL = r"<\|channel\|>\s*final\b(?:\s*<\|message\|>)?|<channel\|>|assistantfinal"  # without special tokens
_CLOSING = rf"(?:<\s*/\s*{_NAME}\s*>|\[/{_NAME}\]|◁/{_NAME}▷|<\|(?:end_of_|end_|/){_NAME}\|>|{_FINAL_CHANNEL})"
_THOUGHTS = re.compile(rf"(?:\s*{_OPENING}.*?{_CLOSING})+", re.IGNORECASE | re.DOTALL)
_ENDLESS_THOUGHTS = re.compile(rf"\s*{_OPENING}", re.IGNORECASE)
_END_OF_THOUGHTS = re.compile(_CLOSING, re.IGNORECASE)

_TAG = re.compile(r"<\s*/?\s*answer\b", re.IGNORECASE)
_SPECIAL_TOKEN = r"<[|｜][\w/▁]+[|｜]>|</s>|<eos>|<end_of_turn>"
_DECORATION = rf"(?:[\s*_~`\"'“”‘’«»().,;:!\[\]{{}}#|-]|</?(?:b|strong|i|em|code|p)>|{_SPECIAL_TOKEN})*"
_VERDICT = re.compile(rf"<\s*answer\s*>(.*)<\s*/\s*answer\s*>{_DECORATION}\Z", re.IGNORECASE | re.DOTALL)

_WORD = re.compile(r"[\w.,/%+−-]+")
_CLAUSE_END = re.compile(r"[.,;:!?\n]")
_DOUBT_BEFORE = re.compile(
    r"\b(?:not|no|never|neither|nor|cannot|without|if|unless|whether|either|or|maybe|perhaps|might|may|could|unsure)\b"
    r"|n['’]t\b",
    re.IGNORECASE,
)
_DOUBT_AFTER = re.compile(
    r"\b(?:or|if|unless|maybe|perhaps|but|except)\b|\A\W*(?:is|was|would)(?:n['’]t\b|\b.*\b(?:not|wrong|incorrect)\b)",
    re.IGNORECASE,
)


def skip_thoughts(reply: str, quotable: str = "") -> str:
    """Return a reply without the thoughts before its answer; "" if the thoughts do not end.

    Thoughts stand in tags at the beginning, or before a closing tag whose opening one was part of the prompt.
    `quotable`: text of others that the reply may quote. If it holds a closing tag, such a tag alone ends no thoughts:
    a text could otherwise have the judge's own verdict skipped.
    """
    if thoughts := _THOUGHTS.match(reply):
        return reply[thoughts.end() :].lstrip()
    if _ENDLESS_THOUGHTS.match(reply):
        return ""
    end = _END_OF_THOUGHTS.search(reply)
    return reply[end.end() :].lstrip() if end and not _END_OF_THOUGHTS.search(quotable) else reply


def parse_verdict(explanation: str) -> int | None:
    """Return the score in a first reply: that of its only answer tag if only punctuation follows; else None."""
    if len(_TAG.findall(explanation)) != 2:
        return None
    match = _VERDICT.search(explanation)
    return parse_score(match[1]) if match else None


def parse_score(text: str) -> int | None:
    """Return the score in a second reply: the only number that it names, 0 or 1; None if there is any doubt.

    A clause that denies the number or leaves it open is a doubt ("not 1", "1 or not", "1?").
    """
    words = [word for word in _WORD.finditer(text) if any(character.isdigit() for character in word[0])]
    numbers = {word[0].lstrip("_").rstrip("_.,-") for word in words}
    if numbers not in ({"0"}, {"1"}) or len(words) > MAX_NUMBERS:
        return None
    if any(_is_doubtful(text[: word.start()], text[word.end() :]) for word in words):
        return None
    return int(numbers.pop())


def parse_bare_score(text: str) -> int | None:
    """Return the score in a second reply that is 0 or 1 and nothing else; None for any other text."""
    return int(text.strip()) if text.strip() in ("0", "1") else None


def _is_doubtful(before: str, after: str) -> bool:
    """Return whether the clause around a number denies it or leaves it open."""
    end = _CLAUSE_END.search(after)
    clause_after = after[: end.start()] if end else after
    is_question = bool(end) and end[0] == "?"
    return is_question or bool(_DOUBT_BEFORE.search(_CLAUSE_END.split(before)[-1]) or _DOUBT_AFTER.search(clause_after))
