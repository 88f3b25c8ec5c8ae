"""A real Ray, with a stand-in for engines: errors are one line, cancelled and killed runs leave nothing."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from masters.common.errors import InputError, MastersError, WorkerError
from masters.common.hashing import model_digest
from masters.config import Runtime
from masters.execution import engines
from masters.execution.engines import Work
from masters.execution.ray_engines.guard import session
from tests.local_stack import until
from tests.ray_cluster import Cluster

pytestmark = pytest.mark.slow  # a start of Ray takes 5 to 10 s where nothing else runs, a minute where much does

ROOT = Path(__file__).parents[2]


def work(place: Path, *pieces: dict, digest: str | None = None) -> Work:
    """Pieces for a model in `place / "model"`, its store beside it."""
    for name in ("out", "store", "model"):
        (place / name).mkdir(exist_ok=True)
    named = [dict(out=f"piece-{n}") | piece for n, piece in enumerate(pieces)]
    setup = dict(folder=str(place / "out"), store=str(place / "store"))
    model = place / "model"
    return Work("model", "tests.stub_engine", setup, named, 1.0, str(model), digest or model_digest(model))


def run(part: Work, place: Path, address: str, hear: object = lambda *_: None, **runtime: object) -> dict:
    settings = Runtime.model_validate(dict(generate_workers=2, ray_address=address) | runtime)
    return engines.run([part], settings, place / "work", hear)  # pyright: ignore[reportArgumentType]


REFUSED: dict[str, tuple[type[MastersError], str, list[dict], dict]] = {
    "engines that keep dying": (
        WorkerError,
        r"died 3 times \(runtime.engine_restarts .*, the last of model at piece-0: ",
        [dict(deadly=True), dict(seconds=1)],
        {},
    ),
    "what an engine raises": (InputError, r"exit code 2: no such picture \(log", [{}, dict(bad=True)], {}),
    "another model": (InputError, "Ray node .* has another model in", [{}], dict(digest="another")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_cluster_cannot_do_is_one_line(name: str, tmp_path: Path, ray_cluster: Cluster) -> None:
    error, says, pieces, other = REFUSED[name]
    with pytest.raises(error, match=says):
        run(work(tmp_path, *pieces, **other), tmp_path, ray_cluster.address, engine_restarts=1)
    until(lambda: not ray_cluster.engines(), "engines to end")
    assert list((tmp_path / "store").iterdir()) == []


class Cancelled(BaseException):
    """As Prefect's."""


def test_a_cancelled_run_leaves_a_cluster_as_it_was(tmp_path: Path, ray_cluster: Cluster) -> None:
    def cancel(_: str, line: dict) -> None:
        if line["event"] == "engine":
            raise Cancelled

    with pytest.raises(Cancelled):
        run(work(tmp_path, *[dict(seconds=600)] * 2), tmp_path, ray_cluster.address, cancel)
    until(lambda: not ray_cluster.engines(), "engines to end")
    assert session(ray_cluster.head)


FLOW = """
import sys
from pathlib import Path
from tests.execution.test_engines import run, work
place = Path(sys.argv[1])
pieces = work(place, *[dict(seconds=600)] * 2)
run(pieces, place, "local", lambda _, line: print(line["event"], line.get("pid"), flush=True))
"""


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary folders go; nothing may be left in it."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)
        assert list(Path(folder).iterdir()) == []


def test_kill_9_of_a_flow_leaves_nothing_of_its_own_ray(tmp_path: Path, short: Path) -> None:
    """Nobody is left who would clean up, but the guard."""
    command, environment = [sys.executable, "-c", FLOW, str(tmp_path)], os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as flow:
        assert flow.stdout
        driver = int(flow.stdout.readline().split()[1])
        assert flow.stdout.readline().split()[0] == "engine"
        assert len(session(driver)) >= 6  # driver, guard, Ray's servers, two engines
        flow.kill()
        until(lambda: not session(driver), "Ray to be gone")
