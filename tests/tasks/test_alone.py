"""Runs that want the same work folder on one machine: one after the other, and the second one's own."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from masters.tasks.stage import alone
from tests.stack import until

HOLDER = """
import sys, time
from pathlib import Path
from masters.tasks.stage import alone
with alone(Path(sys.argv[1]), "train"):
    print("inside", flush=True)
    time.sleep(60)
"""


def test_a_second_run_waits_says_so_and_goes_on_when_the_first_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "inside\n"
    entered = threading.Event()

    def second() -> None:
        with alone(tmp_path, "train of demo"):
            entered.set()

    waiting = threading.Thread(target=second)
    waiting.start()
    time.sleep(1.5)
    assert not entered.is_set()
    holder.kill()
    holder.wait()
    until(entered.is_set, 5, "the second goes on")
    waiting.join()
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("another run on this machine builds train of demo: waiting for it") == 1


def test_one_folder_after_the_other_is_no_wait(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with alone(tmp_path / "one", "one"), alone(tmp_path / "two", "two"):
        pass
