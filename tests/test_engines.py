"""Engines on a real Ray: pieces survive kill -9, errors stay one line, nothing is left, nothing can be reached."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from masters import engines
from masters.config import Runtime
from masters.engines import Work
from masters.errors import InputError, WorkerError
from masters.models.ray_guard import session
from tests.listening import addresses, reachable
from tests.stack import until

pytestmark = pytest.mark.slow  # a start of Ray takes 5 to 10 s where nothing else runs, a minute where much does

WORKER = """
import os, signal, time
from contextlib import contextmanager
from pathlib import Path

from masters.errors import InputError

class Doing:
    def __init__(self, folder):
        self.folder = Path(folder)

    def do(self, piece):
        marker = self.folder / f"{piece['out']}.died"
        if piece.get("deadly") or (piece.get("deadly_once") and not marker.exists()):
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if piece.get("bad"):
            raise InputError("no such picture")
        time.sleep(piece.get("seconds", 0))
        (self.folder / piece["out"]).touch()
        return dict(event="shard", questions=1, pid=os.getpid())

@contextmanager
def opened(setup):
    yield Doing(setup["folder"])
"""


class Heard:
    """What a run said, and the processes of its Ray."""

    def __init__(self) -> None:
        self.lines: list[dict] = []
        self.driver = 0

    def __call__(self, _: str, line: dict) -> None:
        self.lines.append(line)
        self.driver = line["pid"] if line["event"] == "ray" else self.driver

    @property
    def left(self) -> set[int]:
        return session(self.driver) if self.driver else set()


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where pieces go; temporary folders have short names, as Ray's sockets lie in one."""
    (tmp_path / "pieces_worker.py").write_text(WORKER)
    (tmp_path / "out").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with tempfile.TemporaryDirectory(prefix="t-") as short:
        monkeypatch.setenv("TMPDIR", short)
        yield tmp_path
        assert list(Path(short).iterdir()) == []


def work(place: Path, *pieces: dict) -> Work:
    named = [dict(out=f"piece-{n}") | piece for n, piece in enumerate(pieces)]
    setup = dict(folder=str(place / "out"))
    return Work("model", "pieces_worker", setup, named, 1.0, str(place), "")


def ran(part: Work, place: Path, heard: Heard, **runtime: object) -> dict:
    settings = Runtime.model_validate(dict(generate_workers=2, ray_address="local") | runtime)
    return engines.run([part], settings, place / "work", heard)


def done(place: Path) -> list[str]:
    return sorted(file.name for file in (place / "out").glob("piece-?"))


def test_a_killed_engine_is_replaced_and_nothing_listens_beyond_loopback(place: Path) -> None:
    heard, listened = Heard(), set()

    def look(name: str, line: dict) -> None:
        heard(name, line)
        if line["event"] == "shard":
            listened.update(addresses(heard.left))
            assert reachable(heard.left) == set()

    part = work(place, *[{}] * 3, dict(deadly_once=True), *[dict(seconds=0.3)] * 4)
    how = ran(part, place, look)  # pyright: ignore[reportArgumentType]
    assert done(place) == [f"piece-{n}" for n in range(8)]
    assert (how["engines"], how["workers"], how["restarts"]) == (3, 2, 1)
    assert len({line["pid"] for line in heard.lines if line["event"] == "shard"}) >= 2
    assert sum(line.get("questions", 0) for line in heard.lines) == 8
    assert listened and 8265 not in {port for _, port in listened}  # the dashboard's
    assert how["children_peak_mib"] > 100 and len(how["startup_seconds"]) == 3
    assert heard.left == set()


def test_engines_that_keep_dying_end_in_one_clear_error(place: Path) -> None:
    heard = Heard()
    with pytest.raises(
        WorkerError, match=r"died 3 times \(runtime.engine_restarts .*, the last of model at piece-0: "
    ):
        ran(work(place, dict(deadly=True), dict(seconds=1)), place, heard, engine_restarts=1)
    assert heard.left == set()


def test_what_an_engine_raises_is_the_error_that_people_see(place: Path) -> None:
    """Nothing is tried again: it would fail again."""
    heard = Heard()
    with pytest.raises(InputError, match=r"exit code 2: no such picture \(log"):
        ran(work(place, {}, dict(bad=True)), place, heard)
    assert not any(line["event"] == "restart" for line in heard.lines)
    assert heard.left == set()


class Cancelled(BaseException):
    """As Prefect's."""


def test_a_cancelled_run_leaves_nothing(place: Path) -> None:
    heard = Heard()

    def cancel(name: str, line: dict) -> None:
        heard(name, line)
        if line["event"] == "engine":
            raise Cancelled

    with pytest.raises(Cancelled):
        ran(work(place, *[dict(seconds=60)] * 2), place, cancel)  # pyright: ignore[reportArgumentType]
    until(lambda: not heard.left, 2, "the guard")


FLOW = """
import sys
from pathlib import Path
from tests.test_engines import ran, work
place = Path(sys.argv[1])
ran(work(place, *[dict(seconds=60)] * 2), place, lambda _, line: print(line["event"], line.get("pid"), flush=True))
"""


@pytest.mark.parametrize("killed", ["flow", "driver"])
def test_kill_9_leaves_nothing(killed: str, place: Path) -> None:
    """Of the process of the flow, which nobody is left to clean up after, or of Ray's driver."""
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": f"{place}:{root}"}
    command = [sys.executable, "-c", FLOW, str(place)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as flow:
        assert flow.stdout and flow.stderr
        driver = int(flow.stdout.readline().split()[1])
        assert flow.stdout.readline().split()[0] == "engine"
        assert len(session(driver)) >= 6  # driver, guard, Ray's servers, two engines
        os.kill(flow.pid if killed == "flow" else driver, signal.SIGKILL)
        until(lambda: not session(driver), 10, "Ray to be gone")
        said = flow.stderr.read()
    assert killed == "flow" or "WorkerLost: ray ended with signal SIGKILL" in said
