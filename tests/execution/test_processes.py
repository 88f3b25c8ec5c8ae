"""Children that fail: which failures are worth another try, and that no process is left behind."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prefect.states import Failed

import masters
from masters.common import disk_space
from masters.common.errors import InputError, StoreError, WorkerError, WorkerLost
from masters.common.machine import process_birth
from masters.execution import processes
from masters.execution.processes import Child, WorkerModule
from masters.tasks.build_or_reuse import is_retryable
from tests.local_stack import until

MODULES = {
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "fails": "import sys; sys.exit('out of luck')",
    "refuses": "import sys; print('bad input', file=sys.stderr); sys.exit(2)",
    "silent": "import time; time.sleep(600)",
    "fails_in_a_loop": """
from tqdm import tqdm
from masters.execution import child_process, processes

def main(job_file):
    for number in tqdm(range(3), "Loading safetensors checkpoint shards"):
        raise ValueError("shard 1\\nis damaged")

child_process.child_main(main)
""",
    "aborts_in_a_loop": """
import os, sys
print("ValueError: shard 1 is damaged", file=sys.stderr)
print("Loading safetensors checkpoint shards:   0% Completed | 0/1 [00:00<?, ?it/s]", file=sys.stderr, flush=True)
os.abort()
""",
    "meets_a_full_disk": """
import sys
from masters.execution import child_process, processes

def main(job_file):
    sys.stderr = open("/dev/full", "w")  # the log lies on the disk that is full
    with open("/dev/full", "w") as file:
        file.write("weights")

child_process.child_main(main)
""",
    "exceeds_a_size": """
import resource
from pathlib import Path
from masters.execution import child_process, processes

def main(job_file):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    Path(job_file).with_name("weights").write_bytes(bytes(200_000))

child_process.child_main(main)
""",
    "busy": "import time; time.sleep(1)",
    "parent": """
import multiprocessing, time
from masters.execution import child_process, processes

def main(job_file):
    grandchild = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    grandchild.start()
    child_process.report(job_file, event="grandchild", pid=grandchild.pid)
    print("the last line", end="")

child_process.child_main(main)
""",
}


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, code in MODULES.items():
        (tmp_path / f"child_{name}.py").write_text(code)
    source = Path(masters.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{source}")


@pytest.mark.parametrize(
    ("module", "error", "is_retried"),
    [("killed", WorkerLost, True), ("fails", WorkerError, False), ("refuses", InputError, False)],
)
def test_only_a_lost_process_is_worth_another_try(module: str, error: type, is_retried: bool, tmp_path: Path) -> None:
    with pytest.raises(error) as raised:
        processes.run([Child(module, f"child_{module}", {}, tmp_path)], 1, lambda *_: None)
    assert type(raised.value) is error
    assert is_retryable(None, None, Failed(data=raised.value)) is is_retried  # type: ignore[arg-type]


def test_a_file_above_the_size_limit_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="large stopped: File too large") as raised:
        processes.run([Child("large", "child_exceeds_a_size", {}, tmp_path)], 1, lambda *_: None)
    assert disk_space.describe(raised.value).endswith(disk_space.SIZE_REMEDY)
    assert not is_retryable(None, None, Failed(data=raised.value))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("module", "error", "reason"),
    [
        ("fails_in_a_loop", WorkerError, "exit code 1: ValueError: shard 1 is damaged \\(log"),
        ("aborts_in_a_loop", WorkerLost, "signal SIGABRT: ValueError: shard 1 is damaged \\(log"),
    ],
)
def test_the_reason_of_an_end_is_no_progress_bar(module: str, error: type, reason: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=reason):
        processes.run([Child(module, f"child_{module}", {}, tmp_path)], 1, lambda *_: None)


def test_the_error_of_an_earlier_attempt_is_not_that_of_this_one(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="same ended with exit code 1: out of luck"):
        processes.run([Child("same", "child_fails", {}, tmp_path)], 1, lambda *_: None)
    with pytest.raises(WorkerLost, match="same ended with signal SIGKILL: it wrote nothing"):
        processes.run([Child("same", "child_killed", {}, tmp_path)], 1, lambda *_: None)


def test_a_full_disk_is_told_at_once(tmp_path: Path) -> None:
    """It is no reason for another try, even if the child could not write its log either."""
    with pytest.raises(StoreError, match="full stopped: No space left on device") as raised:
        processes.run([Child("full", "child_meets_a_full_disk", {}, tmp_path)], 1, lambda *_: None)
    assert not is_retryable(None, None, Failed(data=raised.value))  # type: ignore[arg-type]


def test_a_store_that_failed_is_worth_another_try() -> None:
    assert is_retryable(None, None, Failed(data=StoreError("gone"))) is True  # type: ignore[arg-type]
    assert is_retryable(None, None, Failed(data=ValueError("a bug"))) is False  # type: ignore[arg-type]


def test_a_work_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="work folder .* cannot be written"):
        processes.run([Child("killed", "child_killed", {}, tmp_path / "file")], 1, lambda *_: None)


def test_a_child_ends_at_once_and_what_it_started_with_it(tmp_path: Path) -> None:
    child, pids = Child("parent", "child_parent", {}, tmp_path), []
    began = time.monotonic()
    processes.run([child], 1, lambda _, line: pids.append(line["pid"]))
    assert time.monotonic() - began < 300 and process_birth(pids[0]) is None  # it would sleep for ten minutes
    assert child.log.read_text() == "the last line"


def test_a_child_without_output_is_ended(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(WorkerLost, match="silent wrote nothing for 1 s"):
        processes.run([Child("silent", "child_silent", {}, tmp_path)], 1, lambda *_: None, heartbeat_timeout=1)
    assert time.monotonic() - began < 300  # it would sleep for ten minutes


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0])
def test_the_heartbeat_does_not_follow_a_clock_that_jumps(
    jump: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A day forward, a working child is not taken for silent; a day back, a silent child still is."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    processes.run([Child("busy", "child_busy", {}, tmp_path)], 1, lambda *_: None, heartbeat_timeout=5)
    with pytest.raises(WorkerLost, match="silent wrote nothing for 1 s"):
        processes.run([Child("silent", "child_silent", {}, tmp_path)], 1, lambda *_: None, heartbeat_timeout=1)


def test_children_that_ignore_the_signal_are_ended_together(tmp_path: Path) -> None:
    (tmp_path / "child_stubborn.py").write_text(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('here', flush=True); time.sleep(600)"
    )
    stubborn = [Child(f"stubborn-{n}", "child_stubborn", {}, tmp_path) for n in range(8)]
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
        processes.run([*stubborn, Child("speaks", "child_speaks", {}, tmp_path)], 9, interrupt)
    assert time.monotonic() - ended[0] < 8 * processes.GRACE_SECONDS  # not GRACE_SECONDS for each of them


def test_a_child_ends_with_its_parent_even_before_it_has_imported_anything(tmp_path: Path) -> None:
    """The parent is killed at once; the child would import for an hour first."""
    (tmp_path / "child_slow.py").write_text("import time; time.sleep(3600)")
    parent = (
        "import os, pathlib, signal\n"
        "from masters.execution import processes\n"
        f"child = processes.Child('slow', 'child_slow', {{}}, pathlib.Path({str(tmp_path)!r}))\n"
        "process = processes._start(child, None)\n"
        "print(process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True)
    until(lambda: process_birth(int(done.stdout)) is None, "the child ends")


def test_a_child_may_be_named_after_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="models:/org/name@candidate-1 ended with exit code 2: bad input"):
        processes.run([Child("models:/org/name@candidate-1", "child_refuses", {}, tmp_path)], 1, lambda *_: None)
    assert (tmp_path / "models-org-name-candidate-1.json").exists()


def test_children_that_run_together_have_different_slots(tmp_path: Path) -> None:
    """A slot is free again when its child has ended."""
    (tmp_path / "child_slot.py").write_text(
        "import json, os, sys, time; time.sleep(float(sys.argv[1].split('-')[-1][:-5]));"
        "print(json.dumps(dict(slot=os.environ.get('MASTERS_SLOT'))),"
        "file=open(sys.argv[1].removesuffix('json') + 'progress', 'a'))"
    )
    slots = {}
    children = [Child(name, "child_slot", {}, tmp_path) for name in ("long-2.0", "short-0.1", "last-0.2")]
    processes.run(children, 2, lambda name, line: slots.__setitem__(name, line["slot"]))
    assert slots == {"long-2.0": "0", "short-0.1": "1", "last-0.2": "1"}


@pytest.mark.parametrize("module", WorkerModule)
def test_worker_modules_exist(module: WorkerModule) -> None:
    assert importlib.util.find_spec(module) is not None
