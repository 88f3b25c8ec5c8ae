"""Takes secrets out of what people are told: errors, logs, a webhook's text, tags, parameters and summaries.

What counts: values of environment variables that are named like secrets, and what looks like one by its form: the user
and password of a URL, signatures in its query, an Authorization header, AWS keys. Masking is the last line of defence:
secrets belong into the environment, and nothing here makes it safe to put them into a configuration.
"""

import logging
import os
import re
import traceback

MASK = "***"
SHORTEST = 6  # characters: a shorter value is found in harmless words
NAMED = re.compile(
    r"SECRET|PASSWORD|PASSWD|TOKEN|API_KEY|ACCESS_KEY(?!_ID)|AUTH_STRING|CREDENTIAL|WEBHOOK_URL|CONNECTION_URL"
)
HARMLESS = re.compile(r"TOKENIZERS_PARALLELISM|_FILE$|_PATH$")
PLAIN = re.compile(r"true|false|none|[0-9.]+", re.IGNORECASE)  # settings, not secrets
DATABASES = ("postgresql", "postgres", "mysql", "mariadb", "mssql", "oracle", "cockroachdb")
FORMS = (
    # SQLAlchemy takes passwords with any character in them: up to the last @
    (re.compile(rf"\b((?:{'|'.join(DATABASES)})(?:\+\w+)?://)[^\s'\"]+@"), rf"\1{MASK}@"),
    (re.compile(r"(?<=://)[^\s/@'\"]+@"), f"{MASK}@"),
    (
        re.compile(
            r"(?i)(?<=[?&;])(X-Amz-Signature|X-Amz-Credential|X-Amz-Security-Token|Signature|sig|key|api_key|apikey|token"
            r"|access_token|password|secret)=[^\s&#'\"]+"
        ),
        rf"\1={MASK}",
    ),
    (re.compile(r"(?i)(authorization\W{1,4}(?:bearer|basic)|\bbearer)\s+[A-Za-z0-9+/=._~-]{16,}"), rf"\1 {MASK}"),
    (re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"), MASK),
    (re.compile(r"\b(hf_[A-Za-z0-9]{30,}|sk-(proj-|ant-)?[A-Za-z0-9]{20,})"), MASK),
)


def looks_secret(text: str) -> bool:
    """Whether a text holds what has the form of a secret, whatever this process knows."""
    return any(form.search(text) for form, _ in FORMS)


def redact(text: str) -> str:
    """`text` without the secrets that this process knows or recognizes."""
    for value in _known():
        text = text.replace(value, MASK)
    for form, instead in FORMS:
        text = form.sub(instead, text)
    return text


def redact_logs() -> None:
    """From now on every log record of this process is masked, whichever library makes it and wherever it goes."""
    make = logging.getLogRecordFactory()
    if getattr(make, "masks", False):
        return

    def record(*args: object, **kwargs: object) -> logging.LogRecord:
        made = make(*args, **kwargs)
        try:
            said = made.getMessage()
        except Exception:  # a wrong format is reported by whoever writes the record, as ever
            return made
        if (hidden := redact(said)) != said:
            made.msg, made.args = hidden, ()
        if made.exc_info and made.exc_info[0]:
            raised = "".join(traceback.format_exception(*made.exc_info)).rstrip("\n")
            if (hidden := redact(raised)) != raised:
                made.exc_text = hidden  # formatters take the text that is there
        return made

    record.masks = True  # pyright: ignore[reportFunctionMemberAccess]
    logging.setLogRecordFactory(record)


def _known() -> list[str]:
    """Values of the environment that are secrets, the longest first: one may hold another."""
    values = {
        value
        for name, value in os.environ.items()
        if NAMED.search(name.upper()) and not HARMLESS.search(name.upper()) and not PLAIN.fullmatch(value)
    }
    return sorted((value for value in values if len(value) >= SHORTEST), key=len, reverse=True)
