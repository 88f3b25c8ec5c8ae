"""A child that stays between runs: one process does job after job, and none is left behind."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import masters
from masters.common.errors import WorkerLost
from masters.execution import processes
from masters.execution.processes import Child, Standing
from tests.local_stack import until

CODE = """
import json, os, signal
from masters.execution import processes

def main(job_file):
    for number, now in enumerate(processes.jobs(job_file)):
        job = json.loads(now.read_text())
        if job.get("deadly"):
            os.kill(os.getpid(), signal.SIGKILL)
        print("job", job["name"], flush=True)
        processes.report(now, event="did", pid=os.getpid(), number=number, slot=os.environ[processes.SLOT])

if __name__ == "__main__":
    processes.child_main(main)
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "child_that_stays.py").write_text(CODE)
    ours = Path(masters.__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ours}")


@pytest.fixture
def standing() -> Iterator[Standing]:
    with Standing() as made:
        yield made


def run(folder: Path, *children: tuple[str, Standing | None, bool], at_once: int = 1, **job: object) -> dict[str, dict]:
    """What each child (its name, who stays, whether it does after this job) reported, by name."""
    told: dict[str, dict] = {}
    made = [
        Child(name, "child_that_stays", dict(name=name, **job), folder / name, {}, standing, stays)
        for name, standing, stays in children
    ]
    ran = processes.run(made, at_once, told.__setitem__, 600)
    assert ran.peak_mib > 0
    return told


def is_there(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def test_one_process_does_the_jobs_of_several_runs(tmp_path: Path, standing: Standing) -> None:
    told = [run(tmp_path, (name, standing, True))[name] for name in ("first", "second", "third")]
    assert len({line["pid"] for line in told}) == 1 and [line["number"] for line in told] == [0, 1, 2]
    assert standing.alive and is_there(told[0]["pid"])
    for name in ("first", "second", "third"):  # each job has its own log
        assert (tmp_path / name / f"{name}.log").read_text() == f"job {name}\n"


def test_it_ends_with_the_job_after_which_it_does_not_stay(tmp_path: Path, standing: Standing) -> None:
    first = run(tmp_path, ("first", standing, True))["first"]
    last = run(tmp_path, ("last", standing, False))["last"]
    assert last["pid"] == first["pid"] and not standing.alive
    assert run(tmp_path, ("new", standing, True))["new"]["pid"] != first["pid"]


def test_others_run_while_it_waits_and_it_keeps_its_place(tmp_path: Path, standing: Standing) -> None:
    told = run(tmp_path, ("stays", standing, True), ("other", None, False), at_once=2)
    assert {told[name]["slot"] for name in told} == {"0", "1"}
    assert run(tmp_path, ("judge", None, False))["judge"]["slot"] == "0"
    again = run(tmp_path, ("other", None, False), ("stays", standing, True), at_once=2)
    assert {name: again[name]["slot"] for name in told} == {name: told[name]["slot"] for name in told}
    assert again["stays"]["pid"] == told["stays"]["pid"] and again["other"]["pid"] != told["other"]["pid"]


def test_one_that_died_unseen_is_replaced(tmp_path: Path, standing: Standing) -> None:
    first = run(tmp_path, ("first", standing, True))["first"]
    os.kill(first["pid"], 9)
    until(lambda: not standing.alive, "the process to be gone")
    assert run(tmp_path, ("second", standing, True))["second"]["number"] == 0


def test_one_that_dies_at_work_is_told_and_replaced(tmp_path: Path, standing: Standing) -> None:
    run(tmp_path, ("first", standing, True))
    with pytest.raises(WorkerLost, match="second ended with signal SIGKILL: it wrote nothing"):
        run(tmp_path, ("second", standing, True), deadly=True)
    assert run(tmp_path, ("second", standing, True))["second"]["number"] == 0


def test_a_run_that_is_cancelled_ends_the_one_at_work(tmp_path: Path, standing: Standing) -> None:
    pid = run(tmp_path, ("first", standing, True))["first"]["pid"]

    def cancel(_: str, line: dict) -> None:
        raise KeyboardInterrupt

    child = Child("second", "child_that_stays", dict(name="second"), tmp_path, {}, standing, True)
    with pytest.raises(KeyboardInterrupt):
        processes.run([child], 1, cancel)
    assert not is_there(pid) and not standing.alive


def test_none_is_left_at_the_end(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Standing() as standing:
        pid = run(tmp_path, ("first", standing, True))["first"]["pid"]
        raise KeyboardInterrupt
    assert not is_there(pid)
