"""`make up && make down`, twice: no process is left, and the run that was in flight goes on."""

import subprocess
import sys
from pathlib import Path

import pytest

from masters.infra.api import post
from tests.drawn import write_questions
from tests.stack import RESUMED, ROOT, Stack, serve, until


def make(stack: Stack, target: str) -> str:
    """Its output. The environment is the one that runs the tests: nothing is installed."""
    command = ["make", "--no-print-directory", "-o", ".venv/ready", target, f"BIN={Path(sys.executable).parent}"]
    done = subprocess.run(command, cwd=ROOT, env=stack.environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:] + stack.logs()
    return done.stdout


@pytest.mark.slow
@pytest.mark.stack
def test_up_and_down_twice_leaves_no_process_and_no_lost_run() -> None:
    with serve(stack="light") as stack:
        source = write_questions(stack.folder / "data", 32, bad=False)
        config = dict(
            name="twice", store=dict(root=str(stack.folder / "store")), data=dict(source=str(source)),
            student=dict(model="demo/models/student"), teachers=[dict(model="demo/models/teacher")],
        )  # fmt: skip
        run = stack.start("distill", config=config, until="data")
        later = stack.start("distill", config=config, until="mask")  # waits for the first: the pool takes one
        until(lambda: stack.run(run)["state_type"] in ("PENDING", "RUNNING"), "the run is in flight")
        make(stack, "down")
        assert stack.processes() == {}
        assert stack.urls["prefect_url"] in make(stack, "up")
        for waiting in (run, later):
            stack.complete(waiting, RESUMED)
        runs = post(f"{stack.api}/flow_runs/filter", {})
        assert {one["id"] for one in runs} == {run, later}
        assert make(stack, "down").splitlines()[-1] == "stopped"
        assert stack.processes() == {}
        assert make(stack, "down").splitlines()[-1] == "nothing runs"
