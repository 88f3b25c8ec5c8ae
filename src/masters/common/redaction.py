"""Replaces secrets in errors, logs, webhook messages, MLflow tags and parameters, and summaries.

Secrets are the values of environment variables with names such as `*_TOKEN`, and text in the form of a secret: user and
password in a URL, signatures in its query, an Authorization header, AWS keys. Redaction is the last line of defense:
secrets belong in environment variables, never in a configuration.
"""

import logging
import os
import re
import traceback

MASK = "***"
MIN_SECRET_LENGTH = 6  # characters; shorter values occur in harmless words
SECRET_NAMES = re.compile(
    r"SECRET|PASSWORD|PASSWD|TOKEN|API_KEY|ACCESS_KEY(?!_ID)|AUTH_STRING|CREDENTIAL|WEBHOOK_URL|CONNECTION_URL"
)
HARMLESS_NAMES = re.compile(r"TOKENIZERS_PARALLELISM|_FILE$|_PATH$")
HARMLESS_VALUES = re.compile(r"true|false|none|[0-9.]+", re.IGNORECASE)  # settings, not secrets
DATABASES = ("postgresql", "postgres", "mysql", "mariadb", "mssql", "oracle", "cockroachdb")
SECRET_PATTERNS = (
    # SQLAlchemy accepts any character in a password: redact up to the last @
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


def contains_secret(text: str) -> bool:
    """Return whether a text holds something with the form of a secret."""
    return any(pattern.search(text) for pattern, _ in SECRET_PATTERNS)


def redact(text: str) -> str:
    """Return `text` with every known or recognized secret replaced by `MASK`."""
    for value in _environment_secrets():
        text = text.replace(value, MASK)
    for pattern, replacement in SECRET_PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def redact_logs() -> None:
    """Redact every later log record of this process, whichever library makes it and whichever handler writes it."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def record(*args: object, **kwargs: object) -> logging.LogRecord:
        log_record = make(*args, **kwargs)
        try:
            message = log_record.getMessage()
        except Exception:  # the handler reports a wrong format, as without redaction
            return log_record
        if (redacted := redact(message)) != message:
            log_record.msg, log_record.args = redacted, ()
        if log_record.exc_info and log_record.exc_info[0]:
            trace = "".join(traceback.format_exception(*log_record.exc_info)).rstrip("\n")
            if (redacted := redact(trace)) != trace:
                log_record.exc_text = redacted  # formatters reuse this text
        return log_record

    record.redacts = True  # pyright: ignore[reportFunctionMemberAccess]
    logging.setLogRecordFactory(record)


def _environment_secrets() -> list[str]:
    """Return the secret values of environment variables, longest first, since one may contain another."""
    values = {
        value
        for name, value in os.environ.items()
        if SECRET_NAMES.search(name.upper())
        and not HARMLESS_NAMES.search(name.upper())
        and not HARMLESS_VALUES.fullmatch(value)
    }
    return sorted((value for value in values if len(value) >= MIN_SECRET_LENGTH), key=len, reverse=True)
