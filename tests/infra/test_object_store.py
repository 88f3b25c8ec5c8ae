"""The local store counts as started once its buckets are there, not once it answers."""

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
    """SeaweedFS in its first moments: well, and with some of its buckets."""

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
def test_it_answers_when_every_bucket_is_there(
    made: tuple[str, ...], port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Starting, "made", set(made))
    service = object_store.make_service(tmp_path, port, {})
    assert service.answers() == (made == object_store.BUCKETS)


def test_a_server_that_is_not_there_does_not_answer(tmp_path: Path) -> None:
    service = object_store.make_service(tmp_path, object_store.listener_ports()["s3.port"], {})
    assert not service.answers()


def test_at_rest_it_takes_next_to_no_time(tmp_path: Path) -> None:
    """It runs beside everything else on the machine."""
    with serve(tmp_path) as server:
        before = cpu_seconds(server.pid)
        time.sleep(5)
        assert cpu_seconds(server.pid) - before < 0.3


def cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system
