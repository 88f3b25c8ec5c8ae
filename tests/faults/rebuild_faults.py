"""Retries after a killed rebuild, and after a power failure that damaged a shard."""

import os
import random
import signal
from pathlib import Path

from masters.config.stages import Stage
from tests.faults.disturbed_runs import REGISTER, Running, Seen, World, stage_of
from tests.faults.fault_points import HOWS, At, Fault
from tests.faults.run_spec import Shape

REBUILDS = Shape(Stage.SCORE, rebuild=Stage.MASK, key="rebuilds")
SHARDS = "shards/predictions"


def rebuild_killed(world: World, rng: random.Random, number: int) -> Seen:
    """Kill a run during or after a rebuild of masks: its retry keeps the rebuilt artifact."""
    points = world.points("flow", REBUILDS)
    built = next(n for n, point in enumerate(points, 1) if stage_of(point) == "responses")
    first = next(n for n, point in enumerate(points, 1) if stage_of(point) == "mask")
    done = number % 2 == 1
    at = rng.randint(built, len(points)) if done else rng.randint(first, built - 1)
    store, tried = world.store(REBUILDS), []
    fault = Fault(str(store), str(world.folder / f"faults-{store.name}"), (At("flow", "kill", at, rng.choice(HOWS)),))

    def disturb() -> tuple[int, list[str]]:
        code = world.start(store, REBUILDS, fault).wait()
        return code, [where for _, where in fault.fired()]

    def again() -> Running:
        tried.append(world.start(store, REBUILDS))
        return tried[0]

    kind = f"SIGKILL of a run with --rebuild, {'after it built' if done else 'while it builds'}"
    seen = world.disturbed(kind, store, disturb, REBUILDS, again=again)
    assert not done or tried[0].outcome("mask") == "reused", tried[0].said()
    return seen


def damaged_shard(world: World, rng: random.Random, how: str) -> Seen:
    """Leave a shard empty or truncated, as after a power failure before evaluate reads its shards."""
    first = next(n for n, point in enumerate(world.points("flow", REGISTER), 1) if stage_of(point) == "evaluate")
    store = world.store(REGISTER)
    fault = Fault(str(store), str(world.folder / f"faults-{store.name}"), (At("flow", "kill", first, "before"),))

    def disturb() -> tuple[int, list[str]]:
        assert world.start(store, REGISTER, fault).wait() == -signal.SIGKILL and fault.fired()
        shard = rng.choice(sorted((store / SHARDS).iterdir()))
        _cut(shard, how, rng)
        running = world.start(store, REGISTER)
        code, said = running.wait(), " ".join(running.said().split())
        assert f"{shard.name}: expected" in said and "it was removed" in said, said
        assert not shard.exists()  # so that whoever tries again has it answered
        return code, [f"cut {shard.relative_to(store)}"]

    return world.disturbed(f"SIGKILL of the flow, and a shard is left {how}", store, disturb, REGISTER)


def _cut(shard: Path, how: str, rng: random.Random) -> None:
    os.truncate(shard, 0 if how == "empty" else rng.randint(1, shard.stat().st_size - 1))
