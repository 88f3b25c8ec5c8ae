"""Two runs at once on one machine: one builds, the other waits; the one that builds is killed; the other rebuilds."""

import signal
from dataclasses import replace

from masters.stages import Stage
from tests.faults.world import TRAIN, Seen, World, until


def two_at_once(world: World) -> Seen:
    """The same command twice: one builds, the other waits and takes what there is."""
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
    """While one run trains another is told to build training again: both end well."""
    store = world.store()

    def disturb() -> tuple[int, list[str]]:
        first = world.start(store, TRAIN)
        until(lambda: any(store.glob("train/*/checkpoints/step-*")), "a checkpoint")
        second = world.start(store, replace(TRAIN, rebuild=Stage.TRAIN))
        codes = [first.wait(), second.wait()]
        assert codes == [0, 0], [first.said(), second.said()]
        return max(codes), ["start train/rebuild"]

    return world.disturbed("--rebuild while another run builds", store, disturb, TRAIN)


def holder_killed(world: World) -> Seen:
    """Of two runs the one that trains is killed once the other waits for it: that one goes on from there."""
    store = world.store()

    def disturb() -> tuple[int, list[str]]:
        first = world.start(store, TRAIN)
        until(lambda: any(store.glob("train/*/checkpoints/step-*")), "a checkpoint")
        second = world.start(store, TRAIN)
        until(lambda: "waiting for it" in second.said(), "the second waits")
        first.kill()
        assert first.wait() == -signal.SIGKILL
        return second.wait(), ["kill train/holder"]

    return world.disturbed("SIGKILL of the one of two runs that builds", store, disturb, TRAIN)
