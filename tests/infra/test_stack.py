"""Runs through the local stack as the UI starts them: cancelled, killed, interrupted by `masters down`, finished.

One run's life, in order: a test goes on where the one before it stopped.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from masters.infra.api import post
from masters.store.storage import Storage
from tests.local_stack import RESUMED, ROOT, Stack, serve, until
from tests.shape_data import write_questions

pytestmark = pytest.mark.slow
PREFIX = "s3://lake/team"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with serve(resume_after=10) as running:
        write_questions(running.folder / "data", 48)
        yield running


@pytest.fixture
def store(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Storage:
    for name, value in stack.client_environment().items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    return Storage(PREFIX)


def config(stack: Stack) -> dict:
    """Two mask stages; training takes long enough to be met in it."""
    return dict(
        name="operated", store=dict(root=PREFIX),
        data=dict(source=str(stack.folder / "data/questions.jsonl"), max_rejected_share=0.2),
        student=dict(model="demo/models/student"),
        teachers=[dict(model="demo/models/teacher", r_max=0.2, mask_step=0.2)],
        generate=dict(responses=2, max_tokens=8, dtype="float32"), rewards=dict(accuracy="rules"),
        train=dict(learning_rate=1e-4, questions_per_step=1, epochs=24),
        runtime=dict(max_model_len=512, checkpoint_steps=20),
    )  # fmt: skip


def make(stack: Stack, target: str) -> str:
    """Run make in the environment of the tests, without installing anything. Returns its output."""
    command = ["make", "--no-print-directory", "-o", ".venv/ready", target, f"BIN={Path(sys.executable).parent}"]
    done = subprocess.run(command, cwd=ROOT, env=stack.environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:] + stack.logs()
    return done.stdout


def state(stack: Stack, run: str) -> str:
    return stack.run(run)["state_type"]


def task_states(stack: Stack, run: str) -> dict[str, list[str]]:
    """Return the attempts by stage."""
    found: dict[str, list[str]] = {}
    for task in post(f"{stack.api}/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}, "limit": 200}):
        found.setdefault(task["name"], []).append(task["state_type"])
    return found


def test_a_value_out_of_range_is_refused(stack: Stack) -> None:
    wrong = config(stack) | dict(train=dict(epochs=0))
    with pytest.raises(AssertionError, match="refused"):
        stack.start("distill", config=wrong)


def test_a_run_cancelled_in_generate_leaves_no_child_and_no_partial_files(stack: Stack, store: Storage) -> None:
    run = stack.start("distill", config=config(stack))
    until(lambda: stack.children("generation.worker"), "engines")
    stack.cancel(run)
    until(lambda: not stack.children(), "engines end")
    until(lambda: state(stack, run) == "CANCELLED", "cancelled")
    assert [p for p in stack.processes().values() if "prefect.engine" in p] == []
    done = {kind for kind in store.children("") if any(n.endswith("record.json") for n in store.names(kind))}
    assert done & {"generate", "score", "train"} == set() and {"data", "mask"} <= done


@pytest.fixture(scope="module")
def killed(stack: Stack) -> str:
    """A run whose engine is killed, and whose own process is killed later in train."""
    run = stack.start("distill", config=config(stack))
    until(lambda: stack.children("generation.worker"), "engines")
    os.kill(next(iter(stack.children("generation.worker"))), signal.SIGKILL)
    until(lambda: stack.children("training.worker"), "the generate task's second try, then training")
    flow = next(pid for pid, line in stack.processes().items() if "prefect.engine" in line)
    os.kill(flow, signal.SIGKILL)
    until(lambda: not stack.children(), "the trainer ends with its parent")
    return run


def test_a_crashed_run_is_resumed(stack: Stack, killed: str) -> None:
    until(lambda: stack.run(killed)["run_count"] == 2 and stack.children("training.worker"), "second attempt")


def test_down_leaves_no_process_and_up_resumes_the_run(stack: Stack, killed: str, store: Storage) -> None:
    """Use make, as a user does. A queued run is not lost either."""
    later = config(stack) | dict(store=dict(root="s3://lake/later"))
    waiting = stack.start("distill", config=later, until="mask")  # the pool takes one run at a time
    until(lambda: any("/checkpoints/step-" in name for name in store.names("train")), "a checkpoint")
    make(stack, "down")
    assert stack.processes() == {}
    assert stack.urls["prefect_url"] in make(stack, "up")
    assert "already running" in make(stack, "up")
    stack.complete(killed, RESUMED)
    assert stack.run(killed)["run_count"] == 3, stack.history(killed)
    stack.complete(waiting, RESUMED)


def test_earlier_artifacts_are_reused_and_tracked(stack: Stack, killed: str, store: Storage) -> None:
    summary = json.loads(store.read("summary.json"))
    outcomes = {stage["name"]: stage["outcome"] for stage in summary["stages"]}
    assert outcomes == dict.fromkeys(("data", "mask", "generate", "score"), "reused") | dict.fromkeys(
        ("train", "evaluate", "register"), "built"
    )
    assert next(s for s in summary["stages"] if s["name"] == "train")["resumed_at_step"] > 0
    assert summary["mlflow"]["tracking_uri"] == stack.urls["mlflow_url"]
    assert summary["prefect"]["flow_run_id"] == killed


def test_interrupted_attempts_have_no_running_tasks(stack: Stack, killed: str) -> None:
    told = task_states(stack, killed)
    assert {one for states in told.values() for one in states} == {"COMPLETED", "CRASHED"}, told
    assert sorted(told["train"]) == ["COMPLETED", "CRASHED", "CRASHED"]


def test_a_run_cancelled_in_train_ignores_partial_files_and_is_resumed(
    stack: Stack, killed: str, store: Storage
) -> None:
    """Responses and verdicts are reused from the previous run, so that training starts immediately."""
    wanted = config(stack) | dict(train=config(stack)["train"] | dict(seed=2))
    before = set(store.names("train"))
    run = stack.start("distill", config=wanted)
    until(lambda: any("/checkpoints/step-" in name for name in store.names("train")), "a checkpoint")
    stack.cancel(run)
    until(lambda: not stack.children(), "the trainer ends")
    until(lambda: state(stack, run) == "CANCELLED", "cancelled")
    assert [p for p in stack.processes().values() if "prefect.engine" in p] == []
    left = set(store.names("train")) - before
    assert left and all("/checkpoints/" in name for name in left)
    run = stack.start("distill", config=wanted, until="train")
    stack.complete(run)
    summary = json.loads(store.read("summary.json"))
    train = next(stage for stage in summary["stages"] if stage["name"] == "train")
    assert (summary["prefect"]["flow_run_id"], train["outcome"]) == (run, "built") and train["resumed_at_step"] > 0
    assert not any("/checkpoints/" in name for name in store.names("train"))


def test_a_registered_student_is_evaluated_by_name(stack: Stack, killed: str, store: Storage) -> None:
    run = stack.start("evaluate", config=config(stack), models=["models:/operated@candidate"])
    stack.complete(run)
    answers = [name for name in store.names("evaluate") if name.endswith("record.json")]
    assert len(answers) == 2  # the run's own, and this one


def test_no_run_is_open_and_no_secret_is_shown(stack: Stack, killed: str) -> None:
    alive = {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING", "SCHEDULED"]}}}
    assert post(f"{stack.api}/flow_runs/filter", {"flow_runs": alive}) == []
    secret = stack.client_environment()["AWS_SECRET_ACCESS_KEY"]
    assert secret not in stack.logs()
    assert secret not in json.dumps(post(f"{stack.api}/logs/filter", {"limit": 200}))
    assert make(stack, "down").splitlines()[-1] == "stopped"
    assert stack.processes() == {}
    assert make(stack, "down").splitlines()[-1] == "nothing is running"
