"""HTTP requests to the stack's servers. Without Prefect's client, whose import takes seconds."""

import json
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tenacity import RetryError, Retrying, retry_if_exception, stop_after_delay, wait_exponential

REQUEST_SECONDS = 10
RETRY_SECONDS = 60  # for a server that is overloaded
BUSY_STATUSES = (429, 500, 502, 503, 504)


def is_responding(url: str) -> bool:
    """Return whether a GET request succeeds."""
    try:
        with urlopen(url, timeout=REQUEST_SECONDS):
            return True
    except (OSError, HTTPException):
        return False


def post(url: str, body: dict):
    """Send a POST request and return the JSON response; None if there is no server or it refuses.

    Repeats the request while the server is overloaded (with SQLite, Prefect responds 503 while its file is locked). So
    a request that creates something needs an `idempotency_key`.
    """
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    retrying = Retrying(
        retry=retry_if_exception(_is_busy),
        stop=stop_after_delay(RETRY_SECONDS),
        wait=wait_exponential(max=5, multiplier=0.25),
    )
    try:
        return retrying(_send, request)
    except (OSError, HTTPException, RetryError):
        return None


def worker_is_online(api: str, pool: str, name: str) -> bool:
    """Return whether Prefect shows a worker of the pool as online."""
    workers = post(f"{api}/work_pools/{pool}/workers/filter", {}) or []
    return any(worker["name"] == name and worker["status"] == "ONLINE" for worker in workers)


def _send(request: Request):
    with urlopen(request, timeout=REQUEST_SECONDS) as response:
        return json.loads(response.read() or b"null")


def _is_busy(error: BaseException) -> bool:
    if isinstance(error, HTTPError):
        return error.code in BUSY_STATUSES
    return isinstance(error.reason if isinstance(error, URLError) else error, TimeoutError | HTTPException)
