"""The faults: each a function that disturbs one run of a world at a seeded moment and gives what was seen."""

import os
import random
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

from tests.faults.points import Fault
from tests.faults.proxy import WRITES, Plan
from tests.faults.world import LIMIT, Remote, Seen, World, stage_of

HOWS = ("before", "half", "after")
CHECKED = "check"  # operations of the store's probe, before a run begins
DAY = 86_400.0


def killed(world: World, rng: random.Random, role: str, stage: str, number: int, train: bool) -> Seen:
    """SIGKILL at an operation in a stage's folders, by the process itself: before it, half done, or just done."""
    points = world.points(role, train)
    at = rng.choice([n for n, point in enumerate(points, 1) if stage_of(point) == stage])
    how = HOWS[number % len(HOWS)]
    store = world.store()
    fault = Fault(str(store), str(_log(world)), role, "kill", at, how)
    seen = world.disturbed(
        f"SIGKILL of the {role}, {how}", store, lambda: _run(world, store, fault, train), train=train
    )
    return _signalled(seen)


def stages(world: World, role: str, train: bool) -> list[str]:
    """The stages in which a process of this role touches the store."""
    return [s for s in dict.fromkeys(map(stage_of, world.points(role, train))) if CHECKED not in s]


def killed_often(world: World, rng: random.Random, times: int) -> list[Seen]:
    """One store, a kill after the other, each a little further on, then a run to the end."""
    store, seen = world.store(), []
    for number in range(times):
        role = ("trainer", "flow")[number % 2]
        fault = Fault(str(store), str(_log(world)), role, "kill", rng.randint(5, 20), HOWS[rng.randrange(3)])
        code, fired = _run(world, store, fault, True)
        if not fired:
            break
        left = world.left(store)
        seen.append((f"SIGKILL of the {role}, again", fired[0], left, code))
    last = seen.pop()
    ended = world.disturbed(last[0], store, lambda: (last[3], [last[1]]), train=True)
    found = [
        Seen(kind, stage_of(at), at, True, "killed", ended.recovered, 0.0, type(ended.verdict)(), left)
        for kind, at, left, _ in seen
    ]  # the rows are counted once, after the last
    world.seen.extend(found)
    return [*found, _signalled(ended)]


def killed_on_s3(world: World, remote: Remote, rng: random.Random, number: int) -> Seen:
    """SIGKILL from outside at one of the run's writes: before the server has it, or before the run knows."""
    store, running = remote.store(), []
    kind = ("call", "call_after")[number % 2]
    plan = Plan(kind, at=rng.randint(1, _writes(world, remote)), call=lambda: running[0].kill())
    seen = world.disturbed(
        f"SIGKILL of the flow, S3 write {'under way' if kind == 'call' else 'done'}", store,
        lambda: _remote_run(world, remote, store, plan, running), aws=remote.aws(),
    )  # fmt: skip
    return _signalled(seen)


def s3_fault(world: World, remote: Remote, rng: random.Random, kind: str) -> Seen:
    """What a network or a server does, to one request or to a few in a row."""
    store, writes = remote.store(), _writes(world, remote)
    at = rng.randint(1, writes)
    plan = {
        "S3 answers 500": Plan("500", at=at, times=3),
        "S3 answers 503 SlowDown": Plan("503", at=at, times=4),
        "S3 does not answer, time-out": Plan("hang", at=at, seconds=40),
        "S3 connection cut in an answer's body": Plan("cut", ("GET",), at=rng.randint(1, 12)),
        "S3 connection cut in a request's body": Plan("cut", ("PUT",), at=at),
        "S3 write done, answer lost": Plan("lost", at=at),
        "S3 conditional create done, answer lost": Plan("lost", at=rng.randint(1, 5), conditional=True),
        "S3 away for 8 s": Plan("away", at=at, seconds=8),
        "S3 store no longer lets write": Plan("denied", at=at, times=10_000),
    }[kind]
    return world.disturbed(kind, store, lambda: _remote_run(world, remote, store, plan, []), aws=remote.aws())


S3_FAULTS = (
    "S3 answers 500", "S3 answers 503 SlowDown", "S3 does not answer, time-out",
    "S3 connection cut in an answer's body", "S3 connection cut in a request's body", "S3 write done, answer lost",
    "S3 conditional create done, answer lost", "S3 away for 8 s", "S3 store no longer lets write",
)  # fmt: skip


def disk(world: World, rng: random.Random, what: str, role: str) -> Seen:
    """From a seeded operation on the disk is full, or no longer lets write."""
    train = role == "trainer"
    points = world.points(role, train)
    writes = [
        n for n, p in enumerate(points, 1) if p.split()[0] in ("write", "copy") and CHECKED not in p.split("/")[0]
    ]
    store = world.store()
    fault = Fault(str(store), str(_log(world)), role, what, rng.choice(writes))
    kind = {"full": "disk full (ENOSPC)", "readonly": "store read-only (EROFS)"}[what]
    return world.disturbed(f"{kind}, {role}", store, lambda: _run(world, store, fault, train), train=train)


def small_disk(world: World, rng: random.Random) -> Seen | None:
    """A real file system that is too small; then it is made larger. None where it may not be mounted."""
    with _mounted(world.store(), rng.randint(12, 48)) as store:
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


def clock(world: World, rng: random.Random, jump: float, train: bool) -> Seen:
    """The time of day is another from a seeded operation on."""
    points = world.points("flow", train)
    wanted = [
        n for n, p in enumerate(points, 1) if CHECKED not in p.split("/")[0] and (not train or "rank-0.json" in p)
    ]
    store = world.store()
    fault = Fault(str(store), str(_log(world)), "flow", "clock", rng.choice(wanted), jump=jump)
    kind = f"clock jumps a day {'forward' if jump > 0 else 'back'}"
    return world.disturbed(kind, store, lambda: _run(world, store, fault, train), train=train)


def two_at_once(world: World) -> Seen:
    """The same command twice: one builds, the other waits and takes what there is."""
    store = world.store()

    def disturb() -> tuple[int, list[str]]:
        runs = [world.start(store, train=True) for _ in range(2)]
        codes = [running.wait() for running in runs]
        assert any("waiting for it" in running.said() for running in runs)
        outcomes = sorted(_outcome(running.said(), "train") for running in runs)
        assert outcomes == ["built", "reused"], outcomes
        return max(codes), ["start train/both"]

    return world.disturbed("two runs at once", store, disturb, train=True)


def holder_killed(world: World) -> Seen:
    """Of two runs the one that trains is killed: the one that waited goes on from there."""
    store = world.store()

    def disturb() -> tuple[int, list[str]]:
        first = world.start(store, train=True)
        _until(lambda: any(store.glob("train/*/checkpoints/step-*")), "a checkpoint")
        second = world.start(store, train=True)
        _until(lambda: "waiting for it" in second.said(), "the second waits")
        first.kill()
        assert first.wait() == -signal.SIGKILL
        return second.wait(), ["kill train/holder"]

    return _signalled(world.disturbed("SIGKILL of the one of two runs that builds", store, disturb, train=True))


def damaged_checkpoint(world: World, rng: random.Random) -> Seen:
    """A bit of the newest checkpoint flips while nobody runs: it is refused, said, and the one before taken."""
    points, store = world.points("trainer", True), world.store()
    saved = [n for n, p in enumerate(points, 1) if p.startswith("replace") and "/step-" in p]
    fault = Fault(str(store), str(_log(world)), "trainer", "kill", saved[1], "after")

    def disturb() -> tuple[int, list[str]]:
        _, fired = _run(world, store, fault, True)
        newest = sorted(store.glob("train/*/checkpoints/step-*"))[-1]
        data = bytearray(newest.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        newest.write_bytes(bytes(data))
        running = world.start(store, train=True)
        code = running.wait()
        said = " ".join(running.said().split())
        assert "is damaged: expected SHA-256" in said and "going on from the one before" in said, said
        return code, fired

    return world.disturbed("a bit of the newest checkpoint flips", store, disturb, train=True)


def _run(world: World, store: Path, fault: Fault, train: bool) -> tuple[int, list[str]]:
    log = Path(fault.log)
    log.unlink(missing_ok=True)
    code = world.start(store, train, fault).wait()
    lines = log.read_text().splitlines() if log.exists() else []
    return code, [" ".join(line.split("\t")[2:]) for line in lines if line.startswith("fault")]


def _remote_run(world: World, remote: Remote, store: str, plan: Plan, running: list) -> tuple[int, list[str]]:
    remote.plan(plan)
    try:
        running.append(world.start(store, aws=remote.aws()))
        return running[0].wait(), plan.fired
    finally:
        remote.plan(Plan())


def _writes(world: World, remote: Remote) -> int:
    """How many writes an undisturbed run sends."""
    if not remote.writes:
        plan, store = Plan("count", WRITES, at=1, times=10_000), remote.store()
        code, fired = _remote_run(world, remote, store, plan, [])
        assert code == 0
        remote.writes = len(fired)
    return remote.writes


def _signalled(seen: Seen) -> Seen:
    seen.signal, seen.outcome = True, "killed"
    return seen


def _outcome(said: str, stage: str) -> str:
    return next(line.split()[1] for line in said.splitlines() if line.startswith(f"{stage} "))


def _log(world: World) -> Path:
    return world.folder / "fault.log"


def _until(condition, what: str, seconds: float = LIMIT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


@contextmanager
def _mounted(folder: Path, kib: int):
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "masters-faults", str(folder)]
    try:
        mounted = os.getuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
