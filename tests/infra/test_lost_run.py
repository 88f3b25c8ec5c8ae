"""A run whose process and worker are gone is found by its missing heartbeats."""

import os
import signal

import pytest

from tests.local_stack import RESUMED, serve, until
from tests.shape_data import write_questions

pytestmark = pytest.mark.slow


def test_a_run_without_heartbeats_is_crashed_and_resumed() -> None:
    with serve(stack="light", resume_after=10, lost_after=60) as stack:
        source = write_questions(stack.folder / "data", 24, bad=False)
        config = dict(
            name="lost", store=dict(root=str(stack.folder / "store")), data=dict(source=str(source)),
            student=dict(model="demo/models/student"), teachers=[dict(model="demo/models/teacher", r_max=0.0)],
            generate=dict(responses=2, max_tokens=8, dtype="float32"), rewards=dict(accuracy="rules"),
            train=dict(questions_per_step=4), runtime=dict(max_model_len=512),
        )  # fmt: skip
        run = stack.start("distill", config=config, until="train")
        until(lambda: stack.children("generation.worker") or stack.children("training.worker"), "work")
        for name in ("infra.worker", "prefect.engine"):
            os.kill(next(pid for pid, line in stack.processes().items() if name in line), signal.SIGKILL)
        until(lambda: stack.run(run)["state_type"] == "CRASHED", "the automation")
        until(lambda: stack.run(run)["state_type"] == "SCHEDULED", "the other automation")
        stack.up()  # a part of it has died: it starts again
        stack.complete(run, RESUMED)
        assert stack.run(run)["run_count"] == 2, stack.history(run)
