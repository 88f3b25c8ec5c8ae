"""The local store is ready once its buckets exist, not once it answers."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from masters.infra import object_store
from tests.s3_server import serve


class Starting(BaseHTTPRequestHandler):
    """Serve like SeaweedFS right after its start: healthy, with some of the buckets."""

    made: set[str] = set()

    def do_GET(self) -> None:
        known = self.path == "/healthz" or self.path.strip("/") in self.made
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Starting) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize("made", [(), object_store.BUCKETS[:1], object_store.BUCKETS[1:], object_store.BUCKETS])
def test_the_store_is_ready_with_all_buckets(
    made: tuple[str, ...], port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Starting, "made", set(made))
    service = object_store.make_service(tmp_path, port, {})
    assert service.is_ready() == (made == object_store.BUCKETS)


def test_a_missing_server_is_not_ready(tmp_path: Path) -> None:
    service = object_store.make_service(tmp_path, object_store.listener_ports()["s3.port"], {})
    assert not service.is_ready()


def test_the_idle_store_uses_little_cpu(tmp_path: Path) -> None:
    """It shares the machine with training."""
    with serve(tmp_path) as server:
        before = cpu_seconds(server.pid)
        time.sleep(5)
        assert cpu_seconds(server.pid) - before < 0.3


def cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system
