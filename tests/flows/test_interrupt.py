"""An interrupted run ends soon, prints one line, and leaves no process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command_line import ROOT, environment
from tests.flows.test_pipeline import processes_of, settings
from tests.shape_data import write_questions

SECONDS = 300  # to report to Prefect and MLflow and to end the engines


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "code", "line"),
    [
        (signal.SIGINT, 1, "masters: interrupted; run again to continue from here"),
        (signal.SIGTERM, -signal.SIGTERM, None),
    ],
)
def test_a_signal_ends_a_run(stop: signal.Signals, code: int, line: str | None, tmp_path: Path) -> None:
    """The signal is sent to the whole process group, as by Ctrl-C in a terminal."""
    home = tmp_path / "home"
    home.mkdir()
    write_questions(tmp_path / "data", 64)
    running = subprocess.Popen(
        [sys.executable, "-m", "masters.cli", "distill", "configs/easyvqa.toml", *settings(tmp_path)],
        cwd=ROOT,
        env=environment(home, MASTERS_PYTHON=sys.executable),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert running.stderr
    deadline = time.monotonic() + 900
    while not any("generation.worker" in line for line in processes_of(home)):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.5)
    assert len(processes_of(home)) >= 3  # the run, Prefect's server, an engine
    os.killpg(running.pid, stop)
    try:
        _, said = running.communicate(timeout=SECONDS)
    finally:
        running.kill()
    assert running.returncode == code, said[-2000:]
    assert "Traceback" not in said
    assert line is None or line in said.splitlines()
    assert processes_of(home) == []
