"""A forked program cannot be told from one that the interpreter started."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.fork_server import PYTHON, ROOT
from tests.fork_server.call import call_in_process
from tests.local_stack import until


def command_line(*arguments: str, python: str, **variables: str) -> tuple[int, str, str]:
    command, environment = [python, "-m", "masters.cli", *arguments], os.environ | variables
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["distil"], ["check", "configs/none.toml"], ["lineage", "nobody"]])
def test_exit_code_and_output_are_the_interpreters(arguments: list[str], tmp_path: Path) -> None:
    variables = dict(HOME=str(tmp_path), MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    forked, plain = (command_line(*arguments, python=python, **variables) for python in (PYTHON, sys.executable))
    assert forked == plain


def forked_from() -> tuple[int, int, bool, str]:
    return os.getpid(), os.getppid(), "vllm" in sys.modules, os.environ["MARK"]


def test_programs_are_children_of_one_process_that_has_imported_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARK", "given")
    first, second = call_in_process(forked_from), call_in_process(forked_from)
    assert first[0] != second[0] and first[1] == second[1] != os.getpid()
    assert first[2:] == second[2:] == (True, "given")


def test_a_setting_that_libraries_read_at_import_takes_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARK", "given")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not call_in_process(forked_from)[2]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_program_has_the_threads_that_its_environment_says(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    assert call_in_process(torch.get_num_threads) == threads


def killed_by(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_signal_that_ended_the_program_is_passed_on(number: signal.Signals) -> None:
    with pytest.raises(RuntimeError, match=f"ended with {-number}"):
        call_in_process(killed_by, number)


def wait(file: Path) -> None:
    file.write_text(str(os.getpid()))
    time.sleep(600)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_program_ends_with_its_client(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "given").write_bytes(pickle.dumps((wait, (tmp_path / "pid",))))
    command = [PYTHON, "-m", "tests.fork_server.call", str(tmp_path / "given"), str(tmp_path / "result")]
    client = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert client.poll() is None
        time.sleep(0.02)
    client.send_signal(number)
    assert client.wait() == -number
    until(lambda: not Path("/proc", (tmp_path / "pid").read_text()).exists(), "the program ends")
