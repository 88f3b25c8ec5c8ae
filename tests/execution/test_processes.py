"""Children that fail: which failures are worth another try, and that none is left."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from prefect.states import Failed

from masters.common.errors import InputError, StoreError, WorkerError, WorkerLost
from masters.execution import processes
from masters.execution.processes import Child
from masters.infra.service import birth
from masters.tasks.build import retryable
from tests.local_stack import until

MODULES = {
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "fails": "import sys; sys.exit('out of luck')",
    "refuses": "import sys; print('bad input', file=sys.stderr); sys.exit(2)",
    "silent": "import time; time.sleep(600)",
    "busy": "import time; time.sleep(1)",
    "parent": """
import multiprocessing, time
from masters.execution import processes

def main(job_file):
    own = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    own.start()
    processes.report(job_file, event="own", pid=own.pid)
    print("its last word", end="")

processes.child_main(main)
""",
}


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, code in MODULES.items():
        (tmp_path / f"child_{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.parametrize(
    ("module", "error", "again"),
    [("killed", WorkerLost, True), ("fails", WorkerError, False), ("refuses", InputError, False)],
)
def test_only_a_lost_process_is_worth_another_try(module: str, error: type, again: bool, tmp_path: Path) -> None:
    with pytest.raises(error) as raised:
        processes.run([Child(module, f"child_{module}", {}, tmp_path, {})], 1, lambda *_: None)
    assert type(raised.value) is error
    assert retryable(None, None, Failed(data=raised.value)) is again  # type: ignore[arg-type]


def test_a_store_that_failed_is_worth_another_try() -> None:
    assert retryable(None, None, Failed(data=StoreError("gone"))) is True  # type: ignore[arg-type]
    assert retryable(None, None, Failed(data=ValueError("a bug"))) is False  # type: ignore[arg-type]


def test_a_work_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    """As on a disk that is full: no traceback, and another try may succeed."""
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="work folder .* cannot be written"):
        processes.run([Child("killed", "child_killed", {}, tmp_path / "file", {})], 1, lambda *_: None)


def test_a_child_ends_at_once_and_what_it_started_with_it(tmp_path: Path) -> None:
    child, said = Child("parent", "child_parent", {}, tmp_path, {}), []
    began = time.monotonic()
    processes.run([child], 1, lambda _, line: said.append(line["pid"]))
    assert time.monotonic() - began < 300 and birth(said[0]) is None  # it would sleep for ten minutes
    assert child.log.read_text() == "its last word"


def test_a_child_that_says_nothing_is_ended(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(WorkerLost, match="silent wrote nothing for 1 s"):
        processes.run([Child("silent", "child_silent", {}, tmp_path, {})], 1, lambda *_: None, silence=1)
    assert time.monotonic() - began < 300  # it would sleep for ten minutes


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0])
def test_a_clock_that_jumps_ends_no_child_and_hides_no_silence(
    jump: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A day forward, a child that works is not taken for silent; a day back, a silent one still is."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    processes.run([Child("busy", "child_busy", {}, tmp_path, {})], 1, lambda *_: None, silence=5)
    with pytest.raises(WorkerLost, match="silent wrote nothing for 1 s"):
        processes.run([Child("silent", "child_silent", {}, tmp_path, {})], 1, lambda *_: None, silence=1)


def test_children_that_ignore_the_signal_are_ended_together(tmp_path: Path) -> None:
    (tmp_path / "child_stubborn.py").write_text(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('here', flush=True); time.sleep(600)"
    )
    stubborn = [Child(f"stubborn-{n}", "child_stubborn", {}, tmp_path, {}) for n in range(8)]
    ended: list[float] = []

    def interrupt(*_: object) -> None:
        while not all(child.log.exists() and child.log.stat().st_size for child in stubborn):
            time.sleep(0.1)
        ended.append(time.monotonic())
        raise KeyboardInterrupt

    (tmp_path / "child_speaks.py").write_text(
        "import sys, time; open(sys.argv[1].replace('.json', '.progress'), 'w').write('{}\\n'); time.sleep(600)"
    )
    with pytest.raises(KeyboardInterrupt):
        processes.run([*stubborn, Child("speaks", "child_speaks", {}, tmp_path, {})], 9, interrupt)
    assert time.monotonic() - ended[0] < 8 * processes.POLITE  # not POLITE for each of them


def test_a_child_ends_with_its_parent_even_before_it_has_imported_anything(tmp_path: Path) -> None:
    """The parent is killed at once; the child would import for an hour first."""
    (tmp_path / "child_slow.py").write_text("import time; time.sleep(3600)")
    parent = (
        "import os, pathlib, signal\n"
        "from masters.execution import processes\n"
        f"child = processes.Child('slow', 'child_slow', {{}}, pathlib.Path({str(tmp_path)!r}), {{}})\n"
        "process = processes._start(child, {})\n"
        "print(process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True)
    until(lambda: birth(int(done.stdout)) is None, "the child ends")


def test_a_child_may_be_named_after_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="models:/org/name@candidate-1 ended with exit code 2: bad input"):
        processes.run([Child("models:/org/name@candidate-1", "child_refuses", {}, tmp_path, {})], 1, lambda *_: None)
    assert (tmp_path / "models-org-name-candidate-1.json").exists()


def test_what_runs_beside_takes_nobodys_place(tmp_path: Path) -> None:
    """The others run one at a time, also when it has ended."""
    (tmp_path / "child_brief.py").write_text("import time; time.sleep(0.2)")
    (tmp_path / "child_noted.py").write_text(
        "import json, sys, time; begun = time.monotonic(); time.sleep(0.5);"
        "print(json.dumps(dict(begun=begun, ended=time.monotonic())),"
        "file=open(sys.argv[1].replace('json', 'progress'), 'a'))"
    )
    told = {}
    children = [Child(f"one-{n}", "child_noted", {}, tmp_path, {}) for n in range(2)]
    beside = [Child("beside", "child_brief", {}, tmp_path, {})]
    processes.run(children, 1, told.__setitem__, beside=beside)
    assert told["one-0"]["ended"] <= told["one-1"]["begun"]


def test_children_that_run_together_have_places_of_their_own(tmp_path: Path) -> None:
    """A place is free again when its child has ended; what runs beside takes none."""
    (tmp_path / "child_placed.py").write_text(
        "import json, os, sys, time; time.sleep(float(sys.argv[1].split('-')[-1][:-5]));"
        "print(json.dumps(dict(place=os.environ.get('MASTERS_SLOT'))),"
        "file=open(sys.argv[1].removesuffix('json') + 'progress', 'a'))"
    )
    told = {}
    children = [Child(name, "child_placed", {}, tmp_path, {}) for name in ("long-2.0", "short-0.1", "last-0.2")]
    beside = [Child("beside-0.3", "child_placed", {}, tmp_path, {})]
    processes.run(children, 2, lambda name, line: told.__setitem__(name, line["place"]), beside=beside)
    assert told == {"long-2.0": "0", "short-0.1": "1", "last-0.2": "1", "beside-0.3": None}
