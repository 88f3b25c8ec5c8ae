"""A request that Prefect's server refuses because its database is locked is handled again."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from masters.infra import busy_database
from masters.infra.busy_database import RetryWhileBusy
from masters.infra.local_prefect import prefect_api


def make_app(codes: list[int], bodies: list[bytes]) -> Callable:
    """Return an application that reads the body and answers with `codes` in turn. As Starlette, it raises after 503."""

    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        bodies.append(body)
        code = codes.pop(0)
        scope["path"] = "changed by routing"
        await send(dict(type="http.response.start", status=code, headers=[]))
        await send(dict(type="http.response.body", body=str(code).encode()))
        if code == 503:
            raise ConnectionError("database is locked")

    return app


def request(app: Callable, method: str, content: bytes = b"") -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(RetryWhileBusy(app), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request(method, "/flow_runs", content=content)

    return asyncio.run(send())


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy_database, "PAUSES", (0, 0))


@given(busy=st.integers(0, 5), code=st.sampled_from([200, 201, 404, 409, 422, 500]), content=st.binary(max_size=100))
def test_a_request_is_repeated_until_it_is_handled(busy: int, code: int, content: bytes) -> None:
    bodies: list[bytes] = []
    response = request(make_app([503] * busy + [code, 200], bodies), "POST", content)
    assert (response.status_code, response.text) == (code, str(code))
    assert bodies == [content] * (busy + 1)


def test_a_database_that_stays_locked_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy_database, "RETRY_SECONDS", 0.0)
    response = request(make_app([503] * 5, []), "POST")
    assert (response.status_code, response.text) == (503, "503")


def test_a_request_whose_client_leaves_before_the_end_of_the_body_is_not_handled() -> None:
    messages = [dict(type="http.disconnect"), dict(type="http.request", body=b'{"state": ', more_body=True)]
    bodies: list[bytes] = []

    async def handle() -> None:
        async def receive() -> dict:
            return messages.pop()

        async def send(message: dict) -> None:
            raise AssertionError(f"nobody reads {message}")

        await RetryWhileBusy(make_app([200], bodies))(dict(type="http", method="POST"), receive, send)

    asyncio.run(handle())
    assert bodies == []


def test_a_read_is_not_repeated() -> None:
    """The server's readiness is a read that may be 503."""
    bodies: list[bytes] = []
    assert request(make_app([503, 200], bodies), "GET").status_code == 503
    assert len(bodies) == 1


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real Prefect server on a new SQLite file."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    with prefect_api() as started:
        started.wait_until_ready()
        yield started.url


def post(url: str, body: dict) -> dict:
    """Send a request once, as a script without retries does. Raises HTTPError if it is refused."""
    sent = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(sent, timeout=120) as response:
        return json.loads(response.read())


@pytest.mark.slow
def test_many_runs_are_taken_at_once(api: str) -> None:
    """Each request reads and then writes while others write."""
    flow = post(f"{api}/flows/", dict(name="flow"))["id"]
    deployment = post(f"{api}/deployments/", dict(name="deployment", flow_id=flow))["id"]
    until = time.monotonic() + 20

    def start_runs() -> int:
        count = 0
        while time.monotonic() < until:
            post(f"{api}/deployments/{deployment}/create_flow_run", {})
            count += 1
        return count

    with ThreadPoolExecutor(8) as threads:
        counts = [threads.submit(start_runs) for _ in range(8)]
        assert sum(count.result() for count in counts) > 8
