"""Reports to a webhook what a person should know: a night that failed or crashed, a student that got worse.

The webhook's URL is a secret: it is read from MASTERS_WEBHOOK_URL and never logged.
"""

import logging
import os

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

from masters.common.redaction import redact

URL_VARIABLE = "MASTERS_WEBHOOK_URL"
TIMEOUT_SECONDS = 10.0
ATTEMPTS = 3

logger = logging.getLogger(__name__)


def send_report(name: str, status: str, reason: str) -> bool:
    """POST `{"text", "name", "status", "reason"}` to the webhook and return whether it accepted the report.

    Chat services show "text". Without a URL nothing is sent. A failure is only logged: it must not fail the night.
    """
    url = os.environ.get(URL_VARIABLE)
    if not url:
        return False
    reason = redact(reason)  # the text of any library's error
    body = dict(text=f"masters {name}: {status}: {reason}", name=name, status=status, reason=reason)
    retrying = Retrying(
        stop=stop_after_attempt(ATTEMPTS), retry=retry_if_exception_type(httpx.ConnectError), reraise=True
    )
    try:
        # Retried here and not by an httpx transport, because a custom transport would ignore the environment's proxy.
        retrying(lambda: httpx.post(url, json=body, timeout=TIMEOUT_SECONDS).raise_for_status())
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        # The error's own text contains the URL.
        cause = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else type(error).__name__
        logger.warning("the webhook in %s did not accept the report %r (%s)", URL_VARIABLE, status, cause)
        return False
    return True
