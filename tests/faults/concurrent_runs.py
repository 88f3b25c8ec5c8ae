"""Concurrent runs on one machine: one builds while the other waits, is killed, or rebuilds."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from masters.config.stages import Stage
from tests.faults.disturbed_runs import TRAIN, Running, Seen, World, started, until
from tests.faults.run_spec import Shape


def two_at_once(world: World) -> Seen:
    """Start the same command twice: one run builds, the other waits and reuses the artifacts."""
    store = world.store()

    def disturb() -> tuple[int, list[str]]:
        runs = [world.start(store, TRAIN) for _ in range(2)]
        codes = [running.wait() for running in runs]
        assert any("waiting for it" in running.said() for running in runs)
        outcomes = sorted(running.outcome("train") for running in runs)
        assert outcomes == ["built", "reused"], outcomes
        return max(codes), ["start train/both"]

    return world.disturbed("two runs at once", store, disturb, TRAIN)


def rebuilt_at_once(world: World) -> Seen:
    """Start a rebuild of training while another run trains: both complete."""

    def end(first: Running, second: Running) -> int:
        codes = [first.wait(), second.wait()]
        assert codes == [0, 0], [first.said(), second.said()]
        return max(codes)

    again = replace(TRAIN, rebuild=Stage.TRAIN)
    return _while_one_trains(world, "--rebuild while another run builds", again, end, "start train/rebuild")


def holder_killed(world: World) -> Seen:
    """Kill the run that trains while another waits for it: the other continues the training."""

    def end(first: Running, second: Running) -> int:
        first.kill()
        assert first.wait() == -signal.SIGKILL
        return second.wait()

    kind = "SIGKILL of the one of two runs that builds"
    return _while_one_trains(world, kind, TRAIN, end, "kill train/holder")


@contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """Stop processes (SIGSTOP) while the body runs."""
    assert pids
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def _while_one_trains(
    world: World, kind: str, shape: Shape, end: Callable[[Running, Running], int], where: str
) -> Seen:
    """Begin a second run once the first has a checkpoint; `end` gives the exit code.

    The first one's trainers are stopped until the second waits: they would be done before it on a busy machine.
    """
    store = world.store()

    def disturb() -> tuple[int, list[str]]:
        first = world.start(store, TRAIN)
        until(lambda: any(store.glob("train/*/checkpoints/step-*")), "a checkpoint")
        with stopped(started(store, "training.worker")):
            second = world.start(store, shape)
            until(lambda: "waiting for it" in second.said(), "the second waits")
        return end(first, second), [where]

    return world.disturbed(kind, store, disturb, TRAIN)
