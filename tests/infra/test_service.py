"""Services of the stack are ended with all their descendants, and other processes are not."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from masters.common.errors import MastersError
from masters.common.machine import process_birth
from masters.infra import service
from masters.infra.service import Service, find_marked_processes, start_service, stop_service, wait_until_ready
from tests.local_stack import until

IGNORES_SIGTERM = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "STOP_SECONDS", 1)


def python_service(code: str, is_ready: bool = True) -> Service:
    return Service("thing", [sys.executable, "-c", code], {}, lambda: is_ready)


def test_a_service_that_ignores_sigterm_and_its_orphan_are_ended(tmp_path: Path) -> None:
    started = start_service(python_service(IGNORES_SIGTERM), tmp_path, "one")
    until(lambda: len(find_marked_processes("one:thing")) == 2, "both processes run")
    stop_service(started)
    assert not started.is_alive() and find_marked_processes("one:thing") == set()


def test_a_process_with_a_reused_pid_is_left_alone(tmp_path: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    time.sleep(0.1)  # births have the resolution of clock ticks
    try:
        started = start_service(python_service("pass"), tmp_path, "two")
        stop_service(replace(started, pid=bystander.pid))  # as if the kernel had reused the pid
        time.sleep(0.2)
        assert bystander.poll() is None
    finally:
        bystander.send_signal(signal.SIGKILL)
        bystander.wait()


def test_a_service_that_ends_while_it_starts_is_an_error_with_its_last_line(tmp_path: Path) -> None:
    failing = python_service("import sys; sys.exit('the disk is full')", is_ready=False)
    with pytest.raises(MastersError, match="thing ended while it started: the disk is full"):
        wait_until_ready(failing, start_service(failing, tmp_path, "three"), tmp_path, 30)


def test_the_error_of_an_earlier_start_is_not_that_of_this_start(tmp_path: Path) -> None:
    for code, error in (("import sys; sys.exit('the disk is full')", "the disk is full"), ("pass", "it wrote nothing")):
        failing = python_service(code, is_ready=False)
        with pytest.raises(MastersError, match=f"thing ended while it started: {error} "):
            wait_until_ready(failing, start_service(failing, tmp_path, "five"), tmp_path, 30)


def test_a_service_that_does_not_become_ready_is_an_error(tmp_path: Path) -> None:
    unready = python_service("import time; time.sleep(60)", is_ready=False)
    started = start_service(unready, tmp_path, "four")
    with pytest.raises(MastersError, match="did not answer within 0 s"):
        wait_until_ready(unready, started, tmp_path, 0.2)
    stop_service(started)


def test_an_ended_process_has_no_birth() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    until(lambda: process_birth(process.pid) is None, "the process ends")  # as a zombie
    process.wait()
    assert process_birth(process.pid) is None
