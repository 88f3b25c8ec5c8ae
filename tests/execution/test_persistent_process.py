"""A process that stays between runs does job after job, and is not left behind."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import masters
from masters.common.errors import WorkerLost
from masters.execution import processes
from masters.execution.processes import Child, PersistentProcess
from tests.local_stack import until

CODE = """
import json, os, signal
from masters.execution import child_process, processes

def main(first_job):
    for number, job_file in enumerate(child_process.iterate_jobs(first_job)):
        job = json.loads(job_file.read_text())
        if job.get("kills"):
            os.kill(os.getpid(), signal.SIGKILL)
        print("job", job["name"], flush=True)
        child_process.report(job_file, event="done", pid=os.getpid(), number=number, slot=os.environ[processes.SLOT])

if __name__ == "__main__":
    child_process.child_main(main)
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "persistent_child.py").write_text(CODE)
    source = Path(masters.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{source}")


@pytest.fixture
def persistent() -> Iterator[PersistentProcess]:
    with PersistentProcess() as process:
        yield process


def run(
    folder: Path, *children: tuple[str, PersistentProcess | None, bool], max_running: int = 1, **job: object
) -> dict[str, dict]:
    """Run children (name, persistent process, whether it stays after this job). Returns each one's line of progress."""
    lines: dict[str, dict] = {}
    run_children = [
        Child(name, "persistent_child", dict(name=name, **job), folder / name, {}, persistent, keep_alive)
        for name, persistent, keep_alive in children
    ]
    usage = processes.run(run_children, max_running, lines.__setitem__, 600)
    assert usage.peak_mib > 0
    return lines


def is_running(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def test_one_process_does_the_jobs_of_several_runs(tmp_path: Path, persistent: PersistentProcess) -> None:
    names = ("first", "second", "third")
    lines = [run(tmp_path, (name, persistent, True))[name] for name in names]
    assert len({line["pid"] for line in lines}) == 1 and [line["number"] for line in lines] == [0, 1, 2]
    assert persistent.is_alive and is_running(lines[0]["pid"])
    for name in names:  # each job has its own log
        assert (tmp_path / name / f"{name}.log").read_text() == f"job {name}\n"


def test_it_ends_after_a_job_that_does_not_keep_it_alive(tmp_path: Path, persistent: PersistentProcess) -> None:
    first = run(tmp_path, ("first", persistent, True))["first"]
    last = run(tmp_path, ("last", persistent, False))["last"]
    assert last["pid"] == first["pid"] and not persistent.is_alive
    assert run(tmp_path, ("new", persistent, True))["new"]["pid"] != first["pid"]


def test_other_children_run_while_it_waits_and_it_keeps_its_slot(tmp_path: Path, persistent: PersistentProcess) -> None:
    first = run(tmp_path, ("stays", persistent, True), ("other", None, False), max_running=2)
    assert {first[name]["slot"] for name in first} == {"0", "1"}
    assert run(tmp_path, ("judge", None, False))["judge"]["slot"] == "0"
    second = run(tmp_path, ("other", None, False), ("stays", persistent, True), max_running=2)
    assert {name: second[name]["slot"] for name in first} == {name: first[name]["slot"] for name in first}
    assert second["stays"]["pid"] == first["stays"]["pid"] and second["other"]["pid"] != first["other"]["pid"]


def test_a_process_that_died_between_runs_is_replaced(tmp_path: Path, persistent: PersistentProcess) -> None:
    first = run(tmp_path, ("first", persistent, True))["first"]
    os.kill(first["pid"], 9)
    until(lambda: not persistent.is_alive, "the process to be gone")
    assert run(tmp_path, ("second", persistent, True))["second"]["number"] == 0


def test_a_process_that_dies_at_work_is_an_error_and_replaced(tmp_path: Path, persistent: PersistentProcess) -> None:
    run(tmp_path, ("first", persistent, True))
    with pytest.raises(WorkerLost, match="second ended with signal SIGKILL: it wrote nothing"):
        run(tmp_path, ("second", persistent, True), kills=True)
    assert run(tmp_path, ("second", persistent, True))["second"]["number"] == 0


def test_a_cancelled_run_ends_the_process_at_work(tmp_path: Path, persistent: PersistentProcess) -> None:
    pid = run(tmp_path, ("first", persistent, True))["first"]["pid"]

    def cancel(_: str, line: dict) -> None:
        raise KeyboardInterrupt

    child = Child("second", "persistent_child", dict(name="second"), tmp_path, {}, persistent, True)
    with pytest.raises(KeyboardInterrupt):
        processes.run([child], 1, cancel)
    assert not is_running(pid) and not persistent.is_alive


def test_none_is_left_at_the_end(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), PersistentProcess() as persistent:
        pid = run(tmp_path, ("first", persistent, True))["first"]["pid"]
        raise KeyboardInterrupt
    assert not is_running(pid)
