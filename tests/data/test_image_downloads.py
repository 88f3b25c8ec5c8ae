"""Images by URL, from a real server: limits, refused addresses, the cache, and what the data's digest covers."""

import io
import json
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpcore
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from masters.common.machine import cache_folder
from masters.config import Config, Data, Model, Store, Teacher
from masters.data import image_downloads
from masters.data.image_downloads import DownloadError, ImageDownloads, check_public, check_url
from masters.data.question_table import source_origin, write_tables
from masters.data.row_validation import RejectedRow, validate_rows
from masters.data.sources import open_source
from masters.store import artifacts, lineage
from masters.store.artifacts import Identity
from masters.store.storage import Storage
from masters.tracking.lineage_report import report_inputs
from tests.data.source_files import png, records

HOSTS = "MASTERS_ALLOWED_IMAGE_HOSTS"


PAGES = {
    "html": b"\n<!DOCTYPE html>\n<title>404", "fragment": b"<p>no", "xml": b"\xef\xbb\xbf<?xml version='1.0'?>",
    "json": b'{"error": "none"}', "empty": b"",
}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """A page for every way in which a download may go."""

    def do_GET(self) -> None:
        self.server.paths[self.path] += 1  # pyright: ignore[reportAttributeAccessIssue]
        kind, _, rest = self.path.partition("?")[0].strip("/").partition("/")
        with suppress(OSError):  # the client has left
            getattr(self, f"_{kind}", self._missing)(rest)

    def _respond(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _png(self, number: str) -> None:
        self._respond(200, png(int(number) + self.server.shift))  # pyright: ignore[reportAttributeAccessIssue]

    def _missing(self, _: str) -> None:
        self._respond(404)

    def _to(self, target: str) -> None:
        self._respond(302, Location=target if "://" in target else f"/{target}")

    def _loop(self, _: str) -> None:
        self._respond(301, Location="/loop")

    def _flaky(self, _: str) -> None:
        requests = self.server.paths[self.path]  # pyright: ignore[reportAttributeAccessIssue]
        self._respond(503) if requests < 3 else self._respond(200, png(5))

    def _status(self, number: str) -> None:
        self._respond(int(number.partition("/")[0]))

    def _page(self, name: str) -> None:
        self._respond(200, PAGES[name])

    def _typed(self, media_type: str) -> None:
        self._respond(200, png(6), Content_Type=media_type)

    def _gzip(self, _: str) -> None:
        self._respond(200, b"x", Content_Encoding="gzip")

    def _large(self, _: str) -> None:
        self._respond(200, bytes(5000))

    def _endless(self, _: str) -> None:
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(bytes(500))

    def _drip(self, _: str) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 1000:
            self.wfile.write(bytes([byte]))
            time.sleep(0.05)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """A server on loopback. `paths`: number of requests; `shift`: makes other pictures of all numbers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.paths: Counter[str] = Counter()
        self.shift = 0

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_port}/{path}"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(image_downloads, "BACKOFF", 0.0)
    monkeypatch.setenv(HOSTS, "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def outcome(url: str, downloads: ImageDownloads | None = None) -> bytes | str:
    """Return the image, or why there is none."""
    downloads = downloads or ImageDownloads()
    downloads.fetch([url])
    try:
        return downloads.read(url)
    except DownloadError as error:
        return str(error)


def test_an_image_is_downloaded_once(server: Server) -> None:
    downloads = ImageDownloads()
    urls = [server.url(f"png/{number}") for number in (1, 2, 1)]
    downloads.fetch(urls)
    assert [downloads.read(url) for url in urls] == [png(1), png(2), png(1)]
    assert outcome(urls[0]) == png(1) and set(server.paths.values()) == {1}, "kept for later runs too"


def test_redirects_are_followed_up_to_a_limit(server: Server) -> None:
    assert outcome(server.url("to/png/3")) == png(3)
    assert outcome(server.url(f"to/{server.url('to/png/4')}")) == png(4)
    assert outcome(server.url("loop")) == "more than 5 redirects"
    assert "expected http:// or https://" in str(outcome(server.url("to/file:///etc/passwd")))


def test_only_transient_errors_are_retried(server: Server) -> None:
    assert outcome(server.url("flaky")) == png(5) and server.paths["/flaky"] == 3
    for status, attempts in ((500, 3), (503, 3), (429, 3), (408, 3), (404, 1), (403, 1), (410, 1)):
        assert outcome(server.url(f"status/{status}")) == f"HTTP {status}"
        assert server.paths[f"/status/{status}"] == attempts


def test_an_error_is_remembered(server: Server) -> None:
    downloads = ImageDownloads()
    assert [outcome(server.url("nothing"), downloads) for _ in range(2)] == ["HTTP 404"] * 2
    assert server.paths["/nothing"] == 1


def test_size_is_limited(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_downloads, "MAX_BYTES", 1000)
    assert outcome(server.url("large")) == outcome(server.url("endless")) == "more than 1000 bytes"
    assert (
        outcome(server.url("gzip")) == "expected a response without compression, as requested, found a compressed one"
    )


def test_time_is_limited_however_slowly_bytes_come(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_downloads, "ATTEMPT_SECONDS", 0.5)
    started = time.monotonic()
    assert "ReadTimeout" in str(outcome(server.url("drip"))) and server.paths["/drip"] == 3
    assert time.monotonic() - started < 10


def test_number_of_urls_is_limited(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_downloads, "MAX_URLS", 2)
    downloads = ImageDownloads()
    found = [outcome(server.url(f"png/{number}"), downloads) for number in range(3)]
    assert found == [png(0), png(1), "a source may name 2 URLs"]


def test_a_host_that_keeps_failing_is_sent_no_more_requests(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_downloads, "MAX_FAILURES", 6)
    downloads = ImageDownloads()
    found = [outcome(server.url(f"status/503/{number}"), downloads) for number in range(3)]
    assert found == ["HTTP 503"] * 2 + ["not requested: the last 6 attempts at 127.0.0.1 failed"]
    assert sum(server.paths.values()) == 6


@pytest.mark.parametrize("path", ["status/404", "status/403", "gzip", "typed/text/html", "loop", "to/ftp://a/b"])
def test_other_errors_are_none_of_the_host(server: Server, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """A host that has lost many images still has the others; an error in between begins a new count."""
    monkeypatch.setattr(image_downloads, "MAX_FAILURES", 4)
    downloads = ImageDownloads()
    for number in range(5):
        outcome(server.url(f"{path}?{number}"), downloads)
        assert outcome(server.url(f"status/503/{number}"), downloads) == "HTTP 503"
    assert outcome(server.url("png/1"), downloads) == png(1)


def test_failures_are_counted_for_the_host_that_a_redirect_names(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_downloads, "MAX_FAILURES", 3)
    monkeypatch.setenv(HOSTS, "127.0.0.1,127.0.0.2")
    downloads = ImageDownloads()
    refused = f"http://127.0.0.2:{server.server_port}/a"
    reasons = [str(outcome(server.url(f"to/{refused}{number}"), downloads)) for number in range(2)]
    assert reasons[0].startswith("ConnectError") and reasons[1].endswith("the last 3 attempts at 127.0.0.2 failed")
    assert outcome(server.url("png/1"), downloads) == png(1)


@pytest.mark.parametrize(
    "media_type", ["text/html; charset=utf-8", "TEXT/plain", "application/json", "application/xhtml+xml"]
)
def test_a_page_in_place_of_an_image_is_an_error_and_not_cached(server: Server, media_type: str) -> None:
    url = server.url(f"typed/{media_type.replace(' ', '')}")
    for requests in (1, 2):
        assert outcome(url) == f"expected an image, found {media_type.replace(' ', '')}"
        assert sum(server.paths.values()) == requests, "an error is not kept for later runs"
    assert not (cache_folder() / "images").exists()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_without_a_media_type_is_an_error_and_not_cached(server: Server, name: str) -> None:
    found = "an empty response" if name == "empty" else "a page"
    assert outcome(server.url(f"page/{name}")) == f"expected an image, found {found}"
    assert not (cache_folder() / "images").exists()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "WEBP", "TGA", "ICO", "JPEG2000"])
def test_no_image_is_taken_for_a_page(kind: str) -> None:
    sink = io.BytesIO()
    Image.new("RGB", (40, 40), (60, 33, 60)).save(sink, kind)
    assert not image_downloads.PAGE.match(sink.getvalue())


@pytest.mark.parametrize("media_type", ["image/png", "application/octet-stream", "binary/octet-stream", "x"])
def test_other_media_types_are_accepted(server: Server, media_type: str) -> None:
    assert outcome(server.url(f"typed/{media_type}")) == png(6)


# addresses


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "127.1", "0", "[::1]"])
def test_loopback_is_refused_however_it_is_written(server: Server, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.delenv(HOSTS)
    assert "which is not public" in str(outcome(server.url("png/1", host)))
    assert not server.paths


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "240.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:a00:1:0:0:80ff:fffe", "198.18.0.1",
        "168.63.129.16", "::ffff:168.63.129.16", "64:ff9b::a83f:8110", "2002:a83f:8110::", "192.0.0.1", "192.0.0.9",
        "192.0.0.170", "192.88.99.1", "::ffff:192.88.99.1", "64:ff9b:1::1", "100.100.100.200", "fd00:ec2::254",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    with pytest.raises(DownloadError, match="which is not public"):
        check_public("host", address)


@pytest.mark.parametrize(
    "address",
    [
        "93.184.216.34", "2606:2800:220:1::1", "::ffff:8.8.8.8", "64:ff9b::808:808", "168.63.129.17", "192.0.1.1",
        "192.88.98.255",
    ],
)  # fmt: skip
def test_public_addresses_are_accepted(address: str) -> None:
    check_public("host", address)


@pytest.mark.parametrize("addresses", [["10.0.0.1"], ["93.184.216.34", "127.0.0.1"], ["::ffff:10.0.0.1"]])
def test_a_name_with_a_private_address_is_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch, addresses: list[str]
) -> None:
    def resolve(host: str, port: int, **_: object) -> list:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.delenv(HOSTS)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert "which is not public" in str(outcome("http://images.example.org/a.png"))


def test_the_address_that_was_checked_is_connected_to(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that resolves to another address the second time gains nothing: it is resolved once."""
    connected, resolved = [], []

    def resolve(host: str, port: int, **_: object) -> list:
        resolved.append(host)
        address = "93.184.216.34" if len(resolved) % 2 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    def connect(self: object, host: str, *_: object, **__: object) -> None:
        connected.append(host)
        raise httpcore.ConnectError("not in a test")

    monkeypatch.delenv(HOSTS)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", connect)
    monkeypatch.setattr(image_downloads, "MAX_ATTEMPTS", 1)
    outcome("http://images.example.org/a.png")
    assert connected == ["93.184.216.34"] and resolved == ["images.example.org"]


def test_a_redirect_to_an_address_that_is_not_public_is_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(host: str, address: str) -> None:
        if address != "127.0.0.1":  # stands for a public address
            check_public(host, address)

    monkeypatch.delenv(HOSTS)
    monkeypatch.setattr(image_downloads, "check_public", check)
    assert outcome(server.url("to/png/1")) == png(1)
    assert "which is not public" in str(outcome(server.url(f"to/{server.url('png/2', '127.0.0.2')}")))
    assert "/png/2" not in server.paths


def test_only_allowed_hosts_are_connected_to(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOSTS, f"images.example.org,127.0.0.1:{server.server_port}")
    assert outcome(server.url("png/1")) == png(1)
    for url in ("http://localhost/a.png", "http://127.0.0.1:1/a.png", server.url("to/http://localhost:1/x")):
        assert (
            outcome(url)
            == f"{'localhost' if 'localhost' in url else '127.0.0.1'} is not among the hosts that {HOSTS} allows"
        )


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://a/b", "expected http:// or https:// and a host, found ftp://"),
        ("http://", "expected http:// or https:// and a host"),
        ("http:///a", "expected http:// or https:// and a host"),
        ("http://user:word@a/b", "the URL has a user or a password"),
        ("http://[::1", "not a URL"),
        ("http://a:b/", "not a URL"),
        ("http://a:99999/", "not a URL: expected a port from 1 to 65535, found 99999"),
        ("http://a:65536/", "not a URL"),
        ("http://a:0/", "not a URL"),
        ("http://a:-1/", "not a URL"),
        ("http://a/\ud800.png", "not a URL"),
        ("http://\ud800/", "not a URL"),
    ],
)
@pytest.mark.parametrize("allowed", ["", "b"])
def test_other_urls_are_refused(monkeypatch: pytest.MonkeyPatch, url: str, reason: str, allowed: str) -> None:
    monkeypatch.setenv(HOSTS, allowed)
    with pytest.raises(DownloadError, match=f"^{reason}"):
        check_url(url)


@given(st.text(alphabet="ahttp:/.@[]%?#0123456789\ud800\xdf \n\\-_", max_size=30))
def test_no_url_raises_another_error(rest: str) -> None:
    with pytest.MonkeyPatch.context() as patch, suppress(DownloadError):
        patch.setenv(HOSTS, "b,http://b/c")
        check_url(f"http://{rest}")


def test_a_port_out_of_range_is_no_other_port(server: Server) -> None:
    """The C library takes 65536 + P for port P."""
    assert str(outcome(f"http://127.0.0.1:{65536 + server.server_port}/png/1")).startswith("not a URL")
    assert not server.paths


# the source


def write_rows(folder: Path, urls: list[str], split: str = "test") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row | {"image": url, "split": split} for row, url in zip(records(len(urls)), urls, strict=True)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def test_rows_hold_the_images_that_their_urls_name(server: Server, tmp_path: Path) -> None:
    path = write_rows(
        tmp_path, [server.url("png/1"), server.url("png/2"), server.url("png/1"), server.url("nothing?key=s")]
    )
    *accepted, rejected = validate_rows(open_source(Data(source=str(path), fetch_images=True)))
    assert [row["image"] for row in accepted] == [png(1), png(2), png(1)]
    url = server.url("nothing")
    reason = f"image cannot be downloaded ('{url}': HTTP 404)"
    assert rejected == RejectedRow("q3", "image cannot be downloaded", reason), "without the query, which may be a key"
    assert set(server.paths.values()) == {1}


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999/a.png", "http://127.0.0.1/\ud800.png", "http://[::1"])
def test_a_malformed_url_costs_only_its_row(server: Server, tmp_path: Path, url: str) -> None:
    source = open_source(Data(source=str(write_rows(tmp_path, [url, server.url("png/1")])), fetch_images=True))
    rejected, accepted = validate_rows(source)
    assert isinstance(rejected, RejectedRow) and rejected.kind == "image cannot be downloaded"
    rejected.reason.encode()  # it is stored
    assert isinstance(accepted, dict) and accepted["image"] == png(1)
    assert len(source.digest()) == 64


def test_without_the_setting_nothing_is_fetched(server: Server, tmp_path: Path) -> None:
    path = write_rows(tmp_path, [server.url("png/1")])
    (row,) = validate_rows(open_source(Data(source=str(path))))
    assert isinstance(row, RejectedRow) and "set data.fetch_images = true" in row.reason and not server.paths


def test_digest_covers_the_images_that_were_fetched(server: Server, tmp_path: Path) -> None:
    path = write_rows(tmp_path, [server.url("png/1"), server.url("png/2")])

    def digest(fetch: bool = True) -> str:
        return open_source(Data(source=str(path), fetch_images=fetch)).digest()

    before = digest()
    assert digest() == before != digest(fetch=False)
    server.shift = 10
    assert digest() == before, "kept: an image is fetched once"
    shutil.rmtree(cache_folder() / "images")
    changed = digest()
    path.write_text(path.read_text().replace("png/2", "nothing"))
    assert len({before, changed, digest()}) == 3


def test_lineage_compares_the_images_that_were_fetched(server: Server, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows", [server.url(f"png/{number}") for number in range(40)], split="")
    config = Config(
        name="x",
        store=Store(root=str(tmp_path / "store")),
        data=Data(source=str(path), fetch_images=True),
        student=Model(model="s"),
        teachers=[Teacher(model="t")],
    )
    storage, source = Storage(config.store.root), open_source(config.data)
    identity = Identity("data", 1, {}, {"source": source.digest()}, "x")
    written = write_tables(config, source, storage, identity.folder)
    upstream = dict(source=source_origin(config.data, source.digest()))
    folder = artifacts.commit(storage, identity, *written, upstream).folder

    def state() -> str:
        (node,) = lineage.walk(storage, {folder: artifacts.load(storage, folder).record["digest"]})
        return report_inputs(node, {})[0]["state"]

    assert state() == "same"
    server.shift = 10
    shutil.rmtree(cache_folder() / "images")
    assert state() == "changed since"


def test_digest_of_a_source_without_urls_does_not_change(server: Server, tmp_path: Path) -> None:
    path = write_rows(tmp_path, ["a.png", "data:image/png,x"])
    assert len({open_source(Data(source=str(path), fetch_images=fetch)).digest() for fetch in (True, False)}) == 1
