"""Tells a webhook what a person should know: a night that failed, a student that got worse.

The address is a secret: it is taken from MASTERS_WEBHOOK_URL and shown nowhere.
"""

import logging
import os

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

from masters.common.redaction import redact

URL_VARIABLE = "MASTERS_WEBHOOK_URL"
SECONDS = 10.0

logger = logging.getLogger(__name__)


def send_report(name: str, status: str, reason: str) -> bool:
    """POST `{"text", "name", "status", "reason"}` (chat services show "text"); whether it was taken.

    Without an address nothing is sent. A webhook that fails is a warning: the night is not worth less for it.
    """
    url = os.environ.get(URL_VARIABLE)
    if not url:
        return False
    reason = redact(reason)  # it may be any library's error
    body = dict(text=f"masters {name}: {status}: {reason}", name=name, status=status, reason=reason)
    try:
        for attempt in Retrying(
            stop=stop_after_attempt(3), retry=retry_if_exception_type(httpx.ConnectError), reraise=True
        ):
            with attempt:  # by httpx itself, which goes through the environment's proxy; a transport of ours would not
                httpx.post(url, json=body, timeout=SECONDS).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        # their texts hold the address
        said = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else type(error).__name__
        logger.warning("the webhook of %s did not take the report %r (%s)", URL_VARIABLE, status, said)
        return False
    return True
