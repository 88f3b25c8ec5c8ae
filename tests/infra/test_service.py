"""Services of the stack are ended with all that they started, and nobody else is."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from masters.common.errors import MastersError
from masters.infra import service
from masters.infra.service import Service, birth, marked, start, stop, wait
from tests.local_stack import until

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "POLITE_SECONDS", 1)


def python(code: str, answers: bool = True) -> Service:
    return Service("thing", [sys.executable, "-c", code], {}, lambda: answers)


def test_a_stubborn_service_and_its_orphan_are_ended(tmp_path: Path) -> None:
    started = start(python(STUBBORN), tmp_path, "one")
    until(lambda: len(marked("one:thing")) == 2, "two of them")
    stop(started)
    assert not started.alive() and marked("one:thing") == set()


def test_a_pid_that_is_someone_elses_by_now_is_left_alone(tmp_path: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    time.sleep(0.1)  # births are told apart by clock ticks
    try:
        started = start(python("pass"), tmp_path, "two")
        stop(replace(started, pid=bystander.pid))  # as if the kernel had given the pid away
        time.sleep(0.2)
        assert bystander.poll() is None
    finally:
        bystander.send_signal(signal.SIGKILL)
        bystander.wait()


def test_a_service_that_ends_while_it_starts_is_an_error_with_its_last_line(tmp_path: Path) -> None:
    failing = python("import sys; sys.exit('the disk is full')", answers=False)
    with pytest.raises(MastersError, match="thing ended while it started: the disk is full"):
        wait(failing, start(failing, tmp_path, "three"), tmp_path, 30)


def test_a_service_that_never_answers_is_an_error(tmp_path: Path) -> None:
    mute = python("import time; time.sleep(60)", answers=False)
    started = start(mute, tmp_path, "four")
    with pytest.raises(MastersError, match="did not answer within 0 s"):
        wait(mute, started, tmp_path, 0.2)
    stop(started)


def test_a_process_that_is_no_more_has_no_birth() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    until(lambda: birth(process.pid) is None, "its end")  # already as a zombie
    process.wait()
    assert birth(process.pid) is None
