"""The guarantees of Storage, on a local folder and on a real S3 server."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.dummy import Pool
from pathlib import Path
from threading import Barrier, Thread
from uuid import uuid4

import pytest
import s3fs
from fsspec.implementations.local import LocalFileSystem

from masters.common.disk_space import is_full
from masters.common.errors import InputError, StoreError
from masters.infra.ports import free_ports
from masters.store.storage import Storage
from tests.s3_server import BUCKET, S3

AWKWARD = "with space/größe 模型 #1+%41&=?.txt"


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return an unused root with a space and a non-ASCII letter."""
    if request.param == "local":
        return str(tmp_path / "störe one")
    server: S3 = request.getfixturevalue("s3")
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/störe one/{uuid4().hex}"


@pytest.fixture
def store(root: str) -> Storage:
    return Storage(root)


@pytest.fixture
def remote(s3: S3, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid4().hex}"


def elsewhere(root: str, statement: str) -> str:
    """Run `statement` with `store` in a separate process. Returns its output."""
    program = f"from masters.store.storage import Storage\nstore = Storage({root!r})\n{statement}"
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout


def test_an_object_is_written_replaced_and_removed(store: Storage) -> None:
    store.write("a/b.bin", b"first")
    store.write("a/b.bin", b"second")
    assert store.read("a/b.bin") == b"second"
    assert store.exists("a/b.bin")
    store.remove("a/b.bin")
    store.remove("a/b.bin")  # gone already
    assert not store.exists("a/b.bin")
    with pytest.raises(FileNotFoundError):
        store.read("a/b.bin")


@pytest.mark.parametrize("size", [0, 1, (5 << 20) + 1])
def test_every_byte_comes_back(store: Storage, size: int) -> None:
    data = os.urandom(size)
    store.write("x", data)
    assert store.read("x") == data


def test_a_replaced_object_is_the_old_or_the_new_one_to_readers(store: Storage) -> None:
    versions = [bytes([n]) * (1 << 20) for n in range(8)]
    store.write("x", versions[0])

    def replace() -> None:
        for version in versions:
            store.write("x", version)

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(replace)
        while not writing.done():
            assert store.read("x") in versions
        writing.result()


def test_create_does_not_replace(store: Storage) -> None:
    assert store.create("x", b"first")
    assert not store.create("x", b"second")
    assert store.read("x") == b"first"
    store.remove("x")
    assert store.create("x", b"third")


def test_one_of_many_threads_creates(store: Storage) -> None:
    racers = 8
    for round_ in range(4):
        start, name = Barrier(racers), f"round-{round_}"

        def race(racer: int, start: Barrier = start, name: str = name) -> bool:
            start.wait()
            return store.create(name, str(racer).encode())

        with Pool(racers) as pool:
            won = pool.map(race, range(racers), chunksize=1)
        assert sum(won) == 1
        assert store.read(name) == str(won.index(True)).encode()


def test_one_of_several_processes_creates(root: str) -> None:
    race = "print(*(int(store.create(f'r{n}', RACER)) for n in range(20)))"
    with ThreadPoolExecutor(3) as pool:
        lines = list(pool.map(lambda n: elsewhere(root, race.replace("RACER", f"b'{n}'")), range(3)))
    wins = [[int(word) for word in line.split()] for line in lines]
    store = Storage(root)
    for number, won in enumerate(zip(*wins, strict=True)):
        assert sum(won) == 1
        assert store.read(f"r{number}") == str(won.index(1)).encode()


def test_listings_show_written_objects(store: Storage) -> None:
    assert store.names("") == store.names("a") == store.children("") == store.children("a") == []
    for name in ("a/1", "a/b/2", "a-b/3", "top"):
        store.write(name, b"x")
    assert store.names("") == ["a-b/3", "a/1", "a/b/2", "top"]
    assert store.names("a") == ["a/1", "a/b/2"]  # and not a-b
    assert store.children("") == ["a", "a-b"]
    assert store.children("a") == ["b"]
    assert store.names("a/1") == store.children("top") == []  # an object is no folder
    assert not store.exists("a")  # a folder is no object
    assert not store.exists("a/1/2")


def test_more_names_than_one_page_of_a_listing(store: Storage) -> None:
    names = [f"many/{number:04d}" for number in range(1005)]
    with Pool(16) as pool:
        pool.map(lambda name: store.write(name, b""), names)
    assert store.names("many") == names


def test_changes_by_another_process_are_seen(root: str, store: Storage) -> None:
    store.write("shards/1", b"x")
    assert store.names("shards") == ["shards/1"] and not store.exists("shards/2") and store.children("new") == []
    elsewhere(root, "store.write('shards/2', b'y'); store.write('new/a/b', b'z'); store.remove('shards/1')")
    assert store.names("shards") == ["shards/2"]
    assert store.names("new") == ["new/a/b"]
    assert store.children("new") == ["a"]
    assert store.exists("shards/2") and not store.exists("shards/1")
    assert store.names("") == ["new/a/b", "shards/2"]


def test_emptied_folders_have_no_objects(store: Storage) -> None:
    store.write("a/b/c", b"x")
    store.remove("a/b/c")
    assert store.names("a/b") == store.names("a") == store.names("") == []
    assert not store.exists("a/b")


def test_names_with_special_characters_are_kept(root: str, store: Storage, tmp_path: Path) -> None:
    store.write(AWKWARD, b"x")
    assert store.names("") == [AWKWARD]
    store.copy(AWKWARD, f"copy/{AWKWARD}")
    assert store.read(f"copy/{AWKWARD}") == b"x"
    assert store.create(f"new/{AWKWARD}", b"y") and not store.create(f"new/{AWKWARD}", b"y")
    assert store.names("copy") == [f"copy/{AWKWARD}"]
    local = store.download("copy", tmp_path / "got it")
    assert (local / AWKWARD).read_bytes() == b"x"
    store.remove(AWKWARD)
    assert not store.exists(AWKWARD)
    assert store.uri("a b/ü").startswith(("s3://", "/")) and store.uri("a b/ü").endswith("/a b/ü")
    assert elsewhere(store.uri(""), "print(store.names('copy'))").strip() == str([f"copy/{AWKWARD}"])


def test_folders_are_uploaded_and_downloaded(store: Storage, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "a.txt").write_bytes(b"a")
    (source / "empty").write_bytes(b"")
    (source / "deep" / "b.bin").write_bytes(bytes(6 << 20))
    store.upload(source, "model")
    store.upload(source / "a.txt", "single.txt")
    assert store.names("") == ["model/a.txt", "model/deep/b.bin", "model/empty", "single.txt"]
    got = store.download("model", tmp_path / "got")
    found = {p.relative_to(got).as_posix(): p.read_bytes() for p in got.rglob("*") if p.is_file()}
    assert found == {"a.txt": b"a", "deep/b.bin": bytes(6 << 20), "empty": b""}


def test_a_copy_is_independent(store: Storage) -> None:
    store.write("x", b"old")
    store.copy("x", "deep/y")
    store.write("x", b"new")
    assert store.read("deep/y") == b"old"
    store.copy("x", "deep/y")  # replaces
    store.remove("x")
    assert store.read("deep/y") == b"new"


def test_check_passes_and_leaves_nothing(store: Storage) -> None:
    with Pool(4) as pool:
        pool.map(lambda _: store.check(), range(4))
    assert store.names("") == []


def test_unfinished_local_writes_are_not_listed(tmp_path: Path) -> None:
    store = Storage(str(tmp_path))
    with store._sibling("a/x") as temporary:
        temporary.write_bytes(b"half")
        assert store.names("") == []
    store.write("a/.x.tmp", b"a name like one")
    assert store.names("") == ["a/.x.tmp"]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Storage(str(tmp_path))
    store.write("a/x", b"")
    scan = os.scandir

    def denied(path: str):
        if str(path).rstrip("/").endswith("/a"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)  # root, as in containers, may read everything
    with pytest.raises(StoreError, match="Permission denied"):
        store.names("")


class TestDownload:
    """Downloads from S3 are complete or absent, and shared by concurrent callers."""

    def test_an_interrupted_download_leaves_nothing(
        self, remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = Storage(remote)
        for name in ("model/1", "model/2", "model/3"):
            store.write(name, name.encode())
        with monkeypatch.context() as patch:
            patch.setattr(store.fs, "get_file", self._fails_at(store.fs.get_file, "model/2"))
            with pytest.raises(StoreError, match="line is cut"):
                store.download("model", tmp_path / "cache" / "model")
        assert list((tmp_path / "cache").iterdir()) == []
        got = store.download("model", tmp_path / "cache" / "model")
        assert sorted(p.name for p in got.iterdir()) == ["1", "2", "3"]

    @staticmethod
    def _fails_at(get_file: Callable, name: str) -> Callable:
        def failing(remote: str, local: str) -> None:
            if remote.endswith(name):
                Path(local).write_bytes(b"half")
                raise OSError("the line is cut")
            get_file(remote, local)

        return failing

    def test_concurrent_downloads_share_a_folder(self, remote: str, tmp_path: Path) -> None:
        store = Storage(remote)
        for number in range(5):
            store.write(f"model/{number}", bytes(100_000))
        with Pool(4) as pool:
            folders = set(pool.map(lambda _: store.download("model", tmp_path / "cache" / "model"), range(4)))
        assert folders == {tmp_path / "cache" / "model"}
        assert [p.name for p in (tmp_path / "cache").iterdir()] == ["model"]
        assert sorted(p.stat().st_size for p in folders.pop().iterdir()) == [100_000] * 5

    def test_an_existing_folder_is_used(self, remote: str, tmp_path: Path) -> None:
        store = Storage(remote)
        store.write("model/1", b"x")
        store.download("model", tmp_path / "model")
        store.remove("model/1")
        assert (store.download("model", tmp_path / "model") / "1").read_bytes() == b"x"

    def test_nothing_to_download_is_an_error(self, remote: str, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="there are no objects below s3://"):
            Storage(remote).download("model", tmp_path / "model")


class TestRefusals:
    """Stores that `check` refuses, quickly and with one line that names the store and the cause."""

    @staticmethod
    def refused(root: str) -> str:
        began = time.monotonic()
        with pytest.raises(InputError) as error:
            Storage(root).check()
        assert time.monotonic() - began < 300  # 1 to 11 s where nothing else runs
        line = str(error.value)
        assert "\n" not in line and root in line
        return line

    def test_nothing_listens(self, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        assert "Could not connect to the endpoint URL" in self.refused(remote)

    def test_the_server_never_answers(self, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
            assert "timeout" in self.refused(remote)

    def test_no_such_bucket(self, remote: str) -> None:
        assert "bucket does not exist" in self.refused("s3://no-such-bucket/prefix")

    def test_no_bucket_named(self, remote: str) -> None:
        with pytest.raises(ValueError, match="names no bucket"):
            Storage("s3://")

    def test_a_wrong_secret(self, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "guessed")
        assert "signature" in self.refused(remote)

    def test_a_key_that_may_only_read(self, s3: S3, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in s3.environment("reader").items():
            monkeypatch.setenv(name, value)
        assert "Access Denied" in self.refused(remote)

    def test_no_keys(self, remote: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert "credentials" in self.refused(remote)

    def test_no_room_is_left(self, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A full server is no server that cannot be reached: waiting does not help."""
        with serve_full_store() as url:
            monkeypatch.setenv("AWS_ENDPOINT_URL", url)
            with pytest.raises(InputError, match="XMinioStorageFull") as refused:
                Storage(remote).check()
            assert type(refused.value) is InputError and is_full(refused.value)
            with pytest.raises(StoreError, match="XMinioStorageFull") as failed:
                Storage(remote).write("x", b"x")
            assert is_full(failed.value)

    def test_conditions_are_ignored(self, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = s3fs.S3FileSystem._pipe_file

        async def careless(self, path, data, mode="overwrite", **options):
            return await honest(self, path, data, **options)

        monkeypatch.setattr(s3fs.S3FileSystem, "_pipe_file", careless)
        assert "does not support conditional writes" in self.refused(remote)

    def test_conditions_are_ignored_by_a_file_system(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "link", os.replace)
        assert "does not support conditional writes" in self.refused(str(tmp_path / "store"))

    def test_listings_lag_behind(self, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(s3fs.S3FileSystem, "find", lambda *_, **__: [])
        assert "does not list" in self.refused(remote)

    def test_a_folder_that_cannot_be_written(self) -> None:
        assert "cannot be written" in self.refused("/proc/masters")


def test_an_error_of_a_store_is_one_line(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    store = Storage(remote, retry=False)
    for use in (store.read, store.exists, store.names, lambda n: store.write(n, b""), lambda n: store.copy(n, "x")):
        with pytest.raises(StoreError) as error:
            use("a")
        assert str(error.value).startswith(f"store {remote}: ") and "\n" not in str(error.value)


def test_requests_outlast_a_short_outage(remote: str, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint is a relay that starts late."""
    [port] = free_ports(1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    store = Storage(remote)
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(store.write, "a", b"x")
        time.sleep(4)
        with _relay(port, int(s3.url.rsplit(":", 1)[1])):
            written.result(90)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    assert Storage(remote).read("a") == b"x"


@contextmanager
def _relay(port: int, target: int) -> Iterator[None]:
    """Forward connections at `port` to `target`."""

    def passes(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def accepts(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", target))
                Thread(target=passes, args=(near, far), daemon=True).start()
                Thread(target=passes, args=(far, near), daemon=True).start()

    with socket.create_server(("127.0.0.1", port)) as listener:
        Thread(target=accepts, args=(listener,), daemon=True).start()
        yield


def test_each_store_reads_the_environment(remote: str, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    Storage(remote).write("a", b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "guessed")
    with pytest.raises(StoreError):
        Storage(remote).read("a")


def test_other_errors_are_not_taken_for_a_refused_condition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(StoreError, match="No space left on device"):
        Storage(str(tmp_path)).create("x", b"")


@contextmanager
def serve_full_store() -> Iterator[str]:
    """Serve the URL of a server that refuses what MinIO refuses when its disk is full."""

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            body = b"<Error><Code>XMinioStorageFull</Code><Message>Storage backend is full</Message></Error>"
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(507)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("part", ["a b", "a'b", 'a"b', "störe", "a#b", "a?b", "a%20b", "a+b", "a&b=c", "[a]", "*"])
def test_a_prefix_may_hold_any_printable_character(part: str, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    storage = Storage(f"s3://{BUCKET}/odd/{part}/prefix")
    storage.check()
    storage.write("x/y", part.encode())
    assert storage.names("x") == ["x/y"] and storage.read("x/y") == part.encode()


def test_a_root_is_a_folder_or_an_s3_prefix() -> None:
    assert isinstance(Storage("some/folder").fs, LocalFileSystem)
    assert Storage("some/folder").uri("x") == str(Path.cwd() / "some/folder/x")
    assert Storage("s3://bucket/prefix/").uri("x") == "s3://bucket/prefix/x"
    assert Storage("s3://bucket").uri("x") == "s3://bucket/x"


def test_only_old_unfinished_writes_are_removed(tmp_path: Path) -> None:
    """An unfinished checkpoint is as large as the model, and nothing else removes it."""
    storage = Storage(str(tmp_path))
    left, fresh = "train/x/.step-1.0a1b2c3d.tmp", "train/x/.step-2.0a1b2c3d.tmp"
    for name in (left, fresh, "train/x/step-0", "train/x/named.tmp", "other/.y.0a1b2c3d.tmp"):
        storage.write(name, b"data")
        if name != fresh:
            os.utime(tmp_path / name, (0, 0))
    storage.remove_unfinished_writes("train/x")
    there = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert there == sorted([fresh, "train/x/step-0", "train/x/named.tmp", "other/.y.0a1b2c3d.tmp"])
    storage.remove_unfinished_writes("nowhere")
