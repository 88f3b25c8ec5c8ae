"""Kills the local stack's Prefect worker during training, alone and with its run."""

import os
import signal

from masters.store.storage import Storage
from tests.faults import verify_store
from tests.faults.disturbed_runs import Running, Seen, World
from tests.faults.verify_store import Finished
from tests.local_stack import ENDED, Stack, serve, until


def worker_killed(world: World) -> list[Seen]:
    """Kill the worker. Alone, its run continues; with the run, the next worker resumes it."""
    with serve(stack="light", resume_after=10, lost_after=60) as stack:
        expected = _undisturbed(world, stack)
        alone = _killed(world, stack, expected, ("infra.worker",))
        both = _killed(world, stack, expected, ("infra.worker", "prefect.engine"))
    return [alone, both]


def _undisturbed(world: World, stack: Stack) -> Finished:
    store = world.store()
    run = stack.start("distill", config=_config(world, str(store)), until="train")
    stack.complete(run)
    finished, wrong = verify_store.finished(Storage(str(store)))
    assert not wrong
    return finished


def _killed(world: World, stack: Stack, expected: Finished, names: tuple[str, ...]) -> Seen:
    """Check that a restarted worker resumes the same run without a new one."""
    store = world.store()

    def disturb() -> tuple[int, list[str]]:
        run = stack.start("distill", config=_config(world, str(store)), until="train")
        until(lambda: any(store.glob("train/*/checkpoints/step-*")), "a checkpoint")
        for name in names:
            os.kill(next(pid for pid, line in stack.processes().items() if name in line), signal.SIGKILL)
        if len(names) > 1:
            until(lambda: stack.run(run)["state_type"] == "SCHEDULED", "it is missed, and resumed")
        else:
            until(lambda: stack.run(run)["state_type"] in ENDED, "its end")
        stack.up()  # a part of it has died: it starts again
        stack.complete(run)
        assert not stack.children()
        return 0, ["kill train/worker"]

    kind = "SIGKILL of the Prefect worker" + (", and of its run" if len(names) > 1 else "")
    return world.disturbed(kind, store, disturb, expected=expected, again=_never)


def _never() -> Running:
    raise AssertionError("the run ended well")


def _config(world: World, store: str) -> dict:
    """Return a configuration without engines (labels as targets) whose training takes long enough to be killed."""
    return dict(
        name="stacked", store=dict(root=store), data=dict(source=str(world.source), max_rejected_share=0.2),
        student=dict(model="demo/models/student"),
        teachers=[dict(model="demo/models/teacher", r_max=0.2, mask_step=0.2)],
        train=dict(objective="kd", targets="labels", learning_rate=1e-4, questions_per_step=1, epochs=15),
        runtime=dict(checkpoint_steps=20),
    )  # fmt: skip
