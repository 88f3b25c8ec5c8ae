"""Two runs that build the same artifact: on one machine they take turns, on two the second overwrites nothing."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from masters.common.hashing import digest
from masters.execution import processes
from masters.execution.processes import ProcessUsage
from masters.store import artifacts
from masters.store.locks import folder_lock
from masters.tasks import train as stage
from masters.tasks.data import data
from masters.tasks.mask import mask
from tests.handmade_run import first_round, make_run, write_training_inputs
from tests.local_stack import until
from tests.shape_data import write_questions

LOCK_HOLDER = """
import sys, time
from pathlib import Path
from masters.store.locks import folder_lock
with folder_lock(Path(sys.argv[1]), print):
    print("inside", flush=True)
    time.sleep(60)
"""


def test_second_run_reports_waiting_and_continues_when_first_is_killed(
    tmp_path: Path,
) -> None:
    holder = subprocess.Popen([sys.executable, "-c", LOCK_HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "inside\n"
    entered, holders = threading.Event(), []

    def second() -> None:
        with folder_lock(tmp_path, holders.append):
            entered.set()

    waiting = threading.Thread(target=second)
    waiting.start()
    time.sleep(1.5)
    assert not entered.is_set()
    holder.kill()
    holder.wait()
    until(entered.is_set, "the second run holds the lock")
    waiting.join()
    assert holders == ["another run on this machine"]


def test_locks_of_different_folders_do_not_wait(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with folder_lock(tmp_path / "one", pytest.fail), folder_lock(tmp_path / "two", pytest.fail):
        pass


def test_second_machine_does_not_overwrite_finished_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights differ between machines by rounding, so they would not match the record of the first machine."""
    run = make_run(tmp_path / "store", write_questions(tmp_path / "source", 12, bad=False))
    current, questions = first_round(run), data.fn(run)
    inputs = {"data": questions, "masks": mask.fn(run, current), **write_training_inputs(run, current, questions)}
    identity, weights = stage.make_identity(run, current, inputs), "model/model.safetensors"

    def finish_on_another_machine(*_: object) -> ProcessUsage:
        (run.work_folder(identity) / "model").mkdir()
        (run.work_folder(identity) / weights).write_bytes(b"second")
        run.storage.write(f"{identity.folder}/{weights}", b"first")
        artifacts.commit(run.storage, identity, {weights: digest(b"first")}, {})
        return ProcessUsage()

    monkeypatch.setattr(processes, "run", finish_on_another_machine)
    trained = stage.train.fn(run, current, inputs)
    assert trained.record["files"] == [dict(name=weights, digest=digest(b"first"), size=5)]
    assert run.storage.read(f"{identity.folder}/{weights}") == b"first"
