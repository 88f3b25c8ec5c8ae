"""Two runs that build the same: on one machine one after the other, on two the second overwrites nothing."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from masters.common.hashing import digest
from masters.execution import processes
from masters.execution.processes import Ran
from masters.store import artifacts
from masters.store.locks import locked
from masters.tasks import train as stage
from masters.tasks.data import data
from masters.tasks.mask import mask
from tests.handmade_run import by_hand, first_round, made_run
from tests.local_stack import until
from tests.shape_data import write_questions

HOLDER = """
import sys, time
from pathlib import Path
from masters.store.locks import locked
with locked(Path(sys.argv[1]), print):
    print("inside", flush=True)
    time.sleep(60)
"""


def test_a_second_run_waits_says_so_and_goes_on_when_the_first_is_killed(
    tmp_path: Path,
) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "inside\n"
    entered, said = threading.Event(), []

    def second() -> None:
        with locked(tmp_path, said.append):
            entered.set()

    waiting = threading.Thread(target=second)
    waiting.start()
    time.sleep(1.5)
    assert not entered.is_set()
    holder.kill()
    holder.wait()
    until(entered.is_set, "the second goes on")
    waiting.join()
    assert said == ["another run on this machine"]


def test_one_folder_after_the_other_is_no_wait(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with locked(tmp_path / "one", pytest.fail), locked(tmp_path / "two", pytest.fail):
        pass


def test_a_machine_that_comes_second_overwrites_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are another machine's roundings away: under the first one's record they would be no match."""
    run = made_run(tmp_path / "store", write_questions(tmp_path / "source", 12, bad=False))
    current, questions = first_round(run), data.fn(run)
    inputs = {"data": questions, "masks": mask.fn(run, current), **by_hand(run, current, questions)}
    made_of, weights = stage.identity(run, current, inputs), "model/model.safetensors"

    def meanwhile(*_: object) -> Ran:
        (run.work(made_of) / "model").mkdir()
        (run.work(made_of) / weights).write_bytes(b"second")
        run.storage.write(f"{made_of.folder}/{weights}", b"first")
        artifacts.commit(run.storage, made_of, {weights: digest(b"first")}, {})
        return Ran()

    monkeypatch.setattr(processes, "run", meanwhile)
    trained = stage.train.fn(run, current, inputs)
    assert trained.record["files"] == [dict(name=weights, digest=digest(b"first"), size=5)]
    assert run.storage.read(f"{made_of.folder}/{weights}") == b"first"
