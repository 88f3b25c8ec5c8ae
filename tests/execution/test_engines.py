"""A real Ray with stub engines: errors are one line, and cancelled and killed runs leave no process behind."""

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
from masters.execution.engines import EngineWork, OnEvent
from masters.execution.events import EngineEvent, EngineStarted
from masters.execution.processes import Child, WorkerModule
from masters.execution.ray_engines.guard import session_processes
from tests.local_stack import until
from tests.ray_cluster import Cluster
from tests.stub_engine import StubPiece, StubSetup

ROOT = Path(__file__).parents[2]
needs_ray = pytest.mark.slow  # Ray starts in 5 to 10 s where nothing else runs, in a minute where much does


def make_work(folder: Path, *pieces: dict, digest: str | None = None) -> EngineWork:
    """Make work of these pieces for a model in `folder / "model"`, with its store beside it."""
    for name in ("out", "store", "model"):
        (folder / name).mkdir(exist_ok=True)
    model = folder / "model"
    return EngineWork(
        name="model",
        module="tests.stub_engine",
        setup=StubSetup(out_folder=folder / "out", store=str(folder / "store"), runtime=Runtime()),
        pieces=tuple(StubPiece(out=f"piece-{number}", **piece) for number, piece in enumerate(pieces)),
        cost=1.0,
        folder=model,
        digest=digest or model_digest(model),
    )


def run(work: EngineWork, folder: Path, address: str, on_event: OnEvent = lambda _: None, **runtime: object) -> dict:
    settings = Runtime.model_validate(dict(generate_workers=2, ray_address=address) | runtime)
    return engines.run([work], settings, folder / "work", on_event)


def test_the_ray_driver_receives_the_fields_of_every_piece_and_setup(tmp_path: Path) -> None:
    """The driver knows the base classes alone; infinite thresholds are among the fields."""
    work = make_work(tmp_path, dict(seconds=float("inf")))
    job = engines.RayJob(work=(work,), workers=1, runtime=Runtime(max_model_len=77))
    driver = Child("ray", WorkerModule.RAY_DRIVER, job, tmp_path)
    driver.write_job()
    (received,) = engines.RayJob.model_validate_json(driver.job_file.read_text()).work
    assert StubPiece(**received.pieces[0].model_dump()) == work.pieces[0]
    assert StubSetup(**received.setup.model_dump()) == work.setup
    assert received.model_copy(update=dict(pieces=(), setup=work.setup)) == work.model_copy(update=dict(pieces=()))


REFUSED: dict[str, tuple[type[MastersError], str, list[dict], dict]] = {
    "engines that keep dying": (
        WorkerError,
        r"died 3 times \(runtime.engine_restarts .*, the last of model at piece-0: ",
        [dict(kills=True), dict(seconds=1)],
        {},
    ),
    "an error of an engine": (InputError, r"exit code 2: no such picture \(log", [{}, dict(fails=True)], {}),
    "another model": (InputError, "Ray node .* has another model in", [{}], dict(digest="another")),
}


@needs_ray
@pytest.mark.parametrize("name", REFUSED)
def test_a_failure_on_a_cluster_is_one_line(name: str, tmp_path: Path, ray_cluster: Cluster) -> None:
    error, message, pieces, options = REFUSED[name]
    with pytest.raises(error, match=message):
        run(make_work(tmp_path, *pieces, **options), tmp_path, ray_cluster.address, engine_restarts=1)
    until(lambda: not ray_cluster.engines(), "engines to end")
    assert list((tmp_path / "store").iterdir()) == []


class Cancelled(BaseException):
    """Stand-in for Prefect's exception of a cancelled run."""


@needs_ray
def test_a_cancelled_run_leaves_a_cluster_as_it_was(tmp_path: Path, ray_cluster: Cluster) -> None:
    def cancel(event: EngineEvent) -> None:
        if isinstance(event, EngineStarted):
            raise Cancelled

    with pytest.raises(Cancelled):
        run(make_work(tmp_path, *[dict(seconds=600)] * 2), tmp_path, ray_cluster.address, cancel)
    until(lambda: not ray_cluster.engines(), "engines to end")
    assert session_processes(ray_cluster.head)


FLOW = """
import sys
from pathlib import Path
from tests.execution.test_engines import make_work, run
folder = Path(sys.argv[1])
work = make_work(folder, *[dict(seconds=600)] * 2)
run(work, folder, "local", lambda event: print(event.event, event.pid, flush=True))
"""


@pytest.fixture
def temporary_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a short name for temporary folders; it must be empty in the end."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)
        assert list(Path(folder).iterdir()) == []


@needs_ray
@pytest.mark.usefixtures("temporary_folder")
def test_kill_9_of_a_flow_leaves_nothing_of_its_local_ray(tmp_path: Path) -> None:
    """Only the guard is left to clean up."""
    command, environment = [sys.executable, "-c", FLOW, str(tmp_path)], os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as flow:
        assert flow.stdout
        driver = int(flow.stdout.readline().split()[1])
        assert flow.stdout.readline().split()[0] == "engine"
        assert len(session_processes(driver)) >= 6  # driver, guard, Ray's servers, two engines
        flow.kill()
        until(lambda: not session_processes(driver), "Ray to be gone")
