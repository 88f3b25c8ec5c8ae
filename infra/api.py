"""The little of HTTP that the stack needs, without the seconds that importing Prefect takes."""

import json
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tenacity import RetryError, Retrying, retry_if_exception, stop_after_delay, wait_exponential

SECONDS = 10  # a request
PATIENCE = 60  # seconds, for a server that is there and too busy
BUSY = (429, 500, 502, 503, 504)


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=SECONDS):
            return True
    except (OSError, HTTPException):
        return False


def post(url: str, body: dict):
    """The JSON answer; None where there is no server, or it refuses.

    A server that is too busy is asked again: on SQLite, Prefect answers 503 while its file is locked. So a body that
    makes something needs an `idempotency_key`.
    """
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    patient = Retrying(
        retry=retry_if_exception(_busy), stop=stop_after_delay(PATIENCE), wait=wait_exponential(max=5, multiplier=0.25)
    )
    try:
        return patient(_answer, request)
    except (OSError, HTTPException, RetryError):
        return None


def worker_is_online(api: str, pool: str, name: str) -> bool:
    found = post(f"{api}/work_pools/{pool}/workers/filter", {}) or []
    return any(worker["name"] == name and worker["status"] == "ONLINE" for worker in found)


def _answer(request: Request):
    with urlopen(request, timeout=SECONDS) as answer:
        return json.loads(answer.read() or b"null")


def _busy(error: BaseException) -> bool:
    if isinstance(error, HTTPError):
        return error.code in BUSY
    return isinstance(error.reason if isinstance(error, URLError) else error, TimeoutError | HTTPException)
