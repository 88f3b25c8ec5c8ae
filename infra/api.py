"""The little of HTTP that the stack needs, without the seconds that importing Prefect takes."""

import json
from urllib.request import Request, urlopen

SECONDS = 10


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=SECONDS):
            return True
    except OSError:
        return False


def post(url: str, body: dict):
    """The JSON answer; None if there is none."""
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=SECONDS) as answer:
            return json.loads(answer.read() or b"null")
    except OSError:
        return None


def worker_is_online(api: str, pool: str, name: str) -> bool:
    found = post(f"{api}/work_pools/{pool}/workers/filter", {}) or []
    return any(worker["name"] == name and worker["status"] == "ONLINE" for worker in found)
