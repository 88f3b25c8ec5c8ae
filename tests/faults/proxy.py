"""An HTTP proxy before the tests' S3 server that injects faults of networks and servers at the N-th matching request.

It hands on heads unchanged, so signatures hold.
"""

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ANSWERS = {"500": (500, "InternalError"), "503": (503, "SlowDown"), "denied": (403, "AccessDenied")}
WRITES = ("PUT", "POST", "DELETE")
CHECK = "/.check/"  # the probe before a run, which is meant to fail soon
LEASES = "/leases/"  # how many signs of life a run gives depends on the time it takes


@dataclass
class Plan:
    """A fault of the matching requests number `at` to `at + times - 1`.

    `kind`: "500", "503", "denied"; "hang" (no answer for `seconds`); "cut" (in mid-body, of a PUT's or an answer's);
    "lost" (done, its answer lost); "count" (nothing); "away" (for `seconds` all connections are closed unheard);
    "call" before it is handed on, "call_after" when it is done and its answer not yet sent.
    """

    kind: str = "none"
    methods: tuple[str, ...] = WRITES
    at: int = 1
    times: int = 1
    seconds: float = 0.0
    conditional: bool = False  # only creates that must not replace
    within: str = ""  # only requests whose path holds it; leases are left out unless it is theirs
    call: Callable[[], None] = lambda: None
    seen: int = 0
    fired: list[str] = field(default_factory=list)
    began: float | None = None

    def due(self, method: str, path: str, conditional: bool) -> bool:
        if self.began is not None and self.kind == "away" and time.monotonic() < self.began + self.seconds:
            return True
        if method not in self.methods or CHECK in path or (self.conditional and not conditional):
            return False
        if self.within not in path or (LEASES in path and self.within != LEASES):
            return False
        self.seen += 1
        due = self.at <= self.seen < self.at + self.times
        if due:
            self.began = self.began or time.monotonic()
            self.fired.append(f"{method} {path.split('?')[0]}")
        return due


class Proxy:
    """The attribute `plan` may be replaced at any time."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream.removeprefix("http://")
        self.plan, self.lock = Plan(), threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def handle_one_request(self) -> None:
                with suppress(ConnectionError, TimeoutError, ValueError):
                    super().handle_one_request()
                    return
                self.close_connection = True

            def __getattr__(self, name: str):
                if name.startswith("do_"):
                    return lambda: owner.serve(self)
                raise AttributeError(name)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def serve(self, client: BaseHTTPRequestHandler) -> None:
        with self.lock:
            plan = self.plan
            due = plan.due(client.command, client.path, "If-None-Match" in client.headers)
        kind = plan.kind if due else "none"
        if kind == "away":
            return _cut(client)
        if kind == "cut" and client.command == "PUT":
            client.rfile.read(int(client.headers.get("Content-Length", 0)) // 2)
            return _cut(client)
        body = _body(client)
        if kind in ANSWERS:
            return _answer(client, *ANSWERS[kind])
        if kind == "hang":
            time.sleep(plan.seconds)
            return _cut(client)
        if kind == "call":
            plan.call()
        status, headers, data = self._handed_on(client, body)
        if kind == "call_after":
            plan.call()
        if kind == "lost":
            return _cut(client)
        _relay(client, status, headers, data, cut=kind == "cut")

    def _handed_on(self, client: BaseHTTPRequestHandler, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.upstream, timeout=60)
        connection.putrequest(client.command, client.path, skip_host=True, skip_accept_encoding=True)
        for name, value in client.headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "expect"):
                connection.putheader(name, value)
        if "Content-Length" not in client.headers and body:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body or None)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, answer.getheaders(), data


@contextmanager
def serve(upstream: str) -> Iterator[Proxy]:
    proxy = Proxy(upstream)
    thread = threading.Thread(target=proxy.server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.server.shutdown()
        proxy.server.server_close()


def _body(client: BaseHTTPRequestHandler) -> bytes:
    if "chunked" in client.headers.get("Transfer-Encoding", ""):
        parts = []
        while size := int(client.rfile.readline().split(b";")[0], 16):
            parts.append(client.rfile.read(size))
            client.rfile.readline()
        client.rfile.readline()
        return b"".join(parts)
    return client.rfile.read(int(client.headers.get("Content-Length", 0)))


def _cut(client: BaseHTTPRequestHandler) -> None:
    client.close_connection = True
    with suppress(OSError):
        client.connection.shutdown(socket.SHUT_RDWR)


def _answer(client: BaseHTTPRequestHandler, status: int, code: str) -> None:
    data = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>by the tests</Message></Error>'.encode()
    _relay(client, status, [("Content-Type", "application/xml"), ("Content-Length", str(len(data)))], data, cut=False)


def _relay(client: BaseHTTPRequestHandler, status: int, headers: list, data: bytes, cut: bool) -> None:
    client.send_response_only(status)
    for name, value in headers:
        if name.lower() not in ("connection", "transfer-encoding"):
            client.send_header(name, value)
    if (
        client.command != "HEAD"
        and status not in (204, 304)
        and not any(n.lower() == "content-length" for n, _ in headers)
    ):
        client.send_header("Content-Length", str(len(data)))
    client.end_headers()
    client.wfile.write(data[: len(data) // 2] if cut else data)
    client.wfile.flush()
    if cut:
        _cut(client)
