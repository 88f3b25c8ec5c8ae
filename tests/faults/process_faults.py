"""Faults of processes and disks: each function disturbs one run at a seeded moment and returns what was seen."""

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow import MlflowClient

from tests.faults.disturbed_runs import SCORE, TRAIN, Running, Seen, World, stage_of
from tests.faults.fault_points import HOWS, At, Fault
from tests.faults.run_spec import Shape

CHECKED = "check"  # operations of the store's probe, before a run begins
DAY = 86_400.0


def killed(
    world: World, rng: random.Random, role: str, stage: str | tuple[str, ...], number: int, shape: Shape = SCORE
) -> Seen:
    """Let a process kill itself before, during or after an operation in a stage's folders."""
    wanted = (stage,) if isinstance(stage, str) else stage
    at = rng.choice([n for n, point in enumerate(world.points(role, shape), 1) if stage_of(point) in wanted])
    how = HOWS[number % len(HOWS)]
    store = world.store(shape)
    fault = _fault(world, store, At(role, "kill", at, how))
    return world.disturbed(f"SIGKILL of the {role}, {how}", store, lambda: _run(world, store, fault, shape), shape)


def killed_often(world: World, rng: random.Random, times: int) -> list[Seen]:
    """So many kills in all: in one store one after the other, each a little further on, until a run comes to its end;
    then in the next store."""
    seen: list[Seen] = []
    while len(seen) < times:
        seen += _killed_in_a_row(world, rng, times - len(seen))
    return seen


def _killed_in_a_row(world: World, rng: random.Random, times: int) -> list[Seen]:
    """Compare the rows once, after the last kill."""
    store, before, codes = world.store(), [], []

    def disturb() -> tuple[int, list[str]]:
        for number in range(times):
            role = ("flow", "trainer")[number % 2]  # a new store's flow always comes to the operation
            fault = _fault(world, store, At(role, "kill", rng.randint(5, 20), rng.choice(HOWS)))
            code, fired = _run(world, store, fault, TRAIN)
            codes.append(code)
            if not fired:
                break
            before.append((role, fired[0], world.left(store)))
        return codes[-1], [where for _, where, _ in before]

    ended = world.disturbed("SIGKILL again and again", store, disturb, TRAIN)
    world.seen.remove(ended)
    found = [
        Seen(
            f"SIGKILL of the {role}, again", stage_of(where), where, True, "killed" if role == "flow" else "failed",
            ended.recovered, 0.0, type(ended.verdict)(), left,
        )
        for role, where, left in before
    ]  # fmt: skip
    found[-1].verdict, found[-1].seconds = ended.verdict, ended.seconds
    found[-1].left += ended.left
    world.seen.extend(found)
    return found


def killed_at_the_end(world: World, rng: random.Random, stage: str, number: int, shape: Shape) -> Seen:
    """Kill the flow in evaluate or register; MLflow must have the student once."""
    seen = killed(world, rng, "flow", stage, number, shape)
    store = str(world.folder / f"store-{world.stores}")
    versions = MlflowClient(world.mlflow).search_model_versions("name = 'trained'")
    ours = [v for v in versions if v.tags["masters.uri"].startswith(f"{store}/")]
    assert [v.tags.get("masters.registered") for v in ours] == ["yes"], ours
    return seen


def disk(world: World, rng: random.Random, what: str, role: str) -> Seen:
    """Let the disk be full or read-only from a seeded operation on."""
    shape = TRAIN if role == "trainer" else SCORE
    writes = _unchecked(world.points(role, shape), lambda point: point.split()[0] in ("write", "copy"))
    store = world.store()
    fault = _fault(world, store, At(role, what, rng.choice(writes)))
    kind = {"full": "disk full (ENOSPC)", "readonly": "store read-only (EROFS)"}[what]
    return world.disturbed(f"{kind}, {role}", store, lambda: _run(world, store, fault, shape), shape)


def small_disk(world: World, rng: random.Random) -> Seen | None:
    """Use a real file system that is too small and then enlarged. Returns None if it cannot be mounted."""
    with mounted(world.store(), rng.randint(12, 48)) as store:
        if store is None:
            return None

        def disturb() -> tuple[int, list[str]]:
            running = world.start(store)
            code = running.wait()
            assert "No space left" in running.said() and "Traceback" not in running.said()
            last = max((p for p in store.rglob("*") if p.is_file()), key=lambda p: p.stat().st_mtime_ns)
            subprocess.run(["mount", "-o", "remount,size=512m", str(store)], check=True)
            return code, [f"write {last.relative_to(store)}"]

        return world.disturbed("disk full (a small tmpfs)", store, disturb)


def clock(world: World, rng: random.Random, jump: float, role: str, shape: Shape) -> Seen:
    """The time of day is another for a process from a seeded operation on; of the flow that trains, when it starts
    the trainer."""
    wanted = _unchecked(
        world.points(role, shape), lambda point: shape != TRAIN or role != "flow" or "rank-0.json" in point
    )
    store = world.store()
    fault = _fault(world, store, At(role, "clock", rng.choice(wanted), jump=jump))
    kind = f"clock jumps a day {'forward' if jump > 0 else 'back'}, {role}"
    return world.disturbed(kind, store, lambda: _run(world, store, fault, shape), shape)


def damaged_checkpoint(world: World, rng: random.Random) -> Seen:
    """Kill the trainer and flip a bit of its newest checkpoint: it is refused, and the previous one is used."""
    points, store = world.points("trainer", TRAIN), world.store()
    saved = [n for n, p in enumerate(points, 1) if p.startswith("replace") and "/step-" in p]
    fault = _fault(world, store, At("trainer", "kill", saved[1], "after"))

    def disturb() -> tuple[int, list[str]]:
        _, fired = _run(world, store, fault, TRAIN)
        newest = sorted(store.glob("train/*/checkpoints/step-*"))[-1]
        data = bytearray(newest.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        newest.write_bytes(bytes(data))
        running = world.start(store, TRAIN)
        code = running.wait()
        said = " ".join(running.said().split())
        assert "is damaged: expected SHA-256" in said and "training continues from the one before" in said, said
        return code, fired

    return world.disturbed("SIGKILL of the trainer, then a bit of its newest checkpoint flips", store, disturb, TRAIN)


def _fault(world: World, store: Path, *plan: At) -> Fault:
    log = world.folder / f"faults-{store.name}"
    log.unlink(missing_ok=True)
    return Fault(str(store), str(log), plan)


def _run(world: World, store: Path, fault: Fault, shape: Shape) -> tuple[int, list[str]]:
    running = world.start(store, shape, fault)
    code, fired = running.wait(), fault.fired()
    _lost_child_named(running, fault, fired)
    return code, [where for _, where in fired]


def _lost_child_named(running: Running, fault: Fault, fired: list[tuple[str, str]]) -> None:
    """Return whether the run reports that its child was killed, which tells the task to retry."""
    if fired and fault.plan[0].what == "kill" and fired[0][0] != "flow":
        assert "ended with signal SIGKILL" in running.said(), running.said()


def _unchecked(points: list[str], fits: Callable[[str], bool]) -> list[int]:
    """Return the numbers of the matching points, without those of the store's check."""
    return [n for n, p in enumerate(points, 1) if CHECKED not in p.split("/")[0] and fits(p)]


@contextmanager
def mounted(folder: Path, kib: int) -> Iterator[Path | None]:
    """Mount a file system of this size in memory while the body runs. Yields None if none may be mounted here."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "masters-faults", str(folder)]
    try:
        is_mounted = os.getuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        is_mounted = False
    try:
        yield folder if is_mounted else None
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
