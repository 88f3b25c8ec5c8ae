"""Requests to a busy server are repeated; those to a refusing or missing one are not."""

import json
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from masters.infra import api
from masters.infra.ports import free_ports

Serve = Callable[[list[int]], tuple[str, list[int]]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a server that responds with these status codes in turn (0: a timeout). Returns its responses."""
    running = []

    def start(codes: list[int]) -> tuple[str, list[int]]:
        answered: list[int] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                code = codes[len(answered)]
                answered.append(code)
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if not code:
                    time.sleep(2)
                    return
                self.send_response(code)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        running.append(server)
        Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}", answered

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def test_a_request_to_a_busy_server_is_repeated(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "REQUEST_SECONDS", 0.5)
    url, answered = serve([503, 0, 503, 200])
    assert api.post(url, {"a": [1]}) == {"a": [1]}
    assert answered == [503, 0, 503, 200]


@pytest.mark.parametrize("code", [404, 409, 422])
def test_a_refusal_is_final(code: int, serve: Serve) -> None:
    url, answered = serve([code, 200])
    assert api.post(url, {}) is None
    assert answered == [code]


def test_requests_to_a_server_that_stays_busy_end(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "RETRY_SECONDS", 1)
    url, answered = serve([503] * 20)
    assert api.post(url, {}) is None
    assert len(answered) > 1


def test_a_missing_server_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited"))
    assert api.post(f"http://127.0.0.1:{free_ports(1)[0]}", {}) is None


def test_invalid_json_gives_none(serve: Serve) -> None:
    url, _ = serve([200])
    assert api.post(url, json.loads("null")) is None
