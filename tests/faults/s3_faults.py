"""Faults of a store on S3, through the tests' proxy: network and server errors, and kills at the N-th request."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from masters.common.hashing import digest
from masters.config.stages import Stage
from masters.store.storage import Storage
from tests.faults.disturbed_runs import (
    MARK,
    ROOT,
    SCORE,
    TRAIN,
    Running,
    Seen,
    World,
    environment,
    stage_of,
    started,
    until,
)
from tests.faults.proxy import LEASES, WRITES, Plan, Proxy
from tests.faults.run_spec import Shape
from tests.faults.verify_store import Verdict
from tests.s3_server import BUCKET, S3

PARTS = 101 << 20  # bytes of a file that s3fs sends in parts, of 50 MiB each
UPLOAD = """
import pathlib, sys
from masters.store.storage import Storage
Storage(sys.argv[1]).upload(pathlib.Path(sys.argv[2]), "large")
"""
WENT_ON, FAILED = "went on", "failed"
WAITS = "another machine builds"
LEASE_FAULTS = {
    "S3 answers 500 to a lease": lambda at: Plan("500", at=at, times=3, within=LEASES),
    "S3 lease taken, answer lost": lambda at: Plan("lost", at=at, conditional=True, within=LEASES),
}


@dataclass
class Remote:
    """The S3 of a world: the real server and the proxy before it."""

    server: S3
    proxy: Proxy
    stores: int = 0
    counted: dict[Shape, list[str]] = field(default_factory=dict)  # an undisturbed run's requests

    def store(self) -> str:
        self.stores += 1
        return self.place(self.stores)

    def place(self, number: int) -> str:
        """Return a root that no other suite on this machine uses, since processes are found by their store."""
        return f"s3://{BUCKET}/store-{os.getpid()}-{number}"

    def aws(self) -> dict[str, str]:
        return self.server.environment() | {"AWS_ENDPOINT_URL": self.proxy.url}

    def plan(self, plan: Plan) -> Plan:
        with self.proxy.lock:
            self.proxy.plan = plan
        return plan


@dataclass(frozen=True)
class S3Fault:
    """Run with a fault. `plan` gets a seeded request's number; `outcome` is the expected outcome of the run."""

    plan: Callable[[int], Plan]
    outcome: str = WENT_ON
    methods: tuple[str, ...] = WRITES


S3_FAULTS = {
    "S3 answers 500": S3Fault(lambda at: Plan("500", at=at, times=3)),
    "S3 answers 503 SlowDown": S3Fault(lambda at: Plan("503", at=at, times=4)),
    "S3 does not answer, time-out": S3Fault(lambda at: Plan("hang", at=at, seconds=40)),
    "S3 connection cut in an answer's body": S3Fault(lambda at: Plan("cut", ("GET",), at=at), methods=("GET",)),
    "S3 connection cut in a request's body": S3Fault(lambda at: Plan("cut", ("PUT",), at=at), methods=("PUT",)),
    "S3 write done, answer lost": S3Fault(lambda at: Plan("lost", at=at)),
    "S3 conditional create done, answer lost": S3Fault(lambda at: Plan("lost", at=1 + at % 5, conditional=True)),
    "S3 away for 8 s": S3Fault(lambda at: Plan("away", at=at, seconds=8)),
    "S3 store no longer lets write": S3Fault(lambda at: Plan("denied", at=at, times=10_000), FAILED),
}


def s3_fault(world: World, remote: Remote, rng: random.Random, kind: str, shape: Shape = SCORE) -> Seen:
    """Disturb one request or a few in a row; in a run that trains, during training."""
    fault, store = S3_FAULTS[kind], remote.store()
    plan = fault.plan(_chosen(world, remote, rng, shape, fault.methods))
    seen = world.disturbed(kind, store, lambda: _run(world, remote, store, plan, shape, []), shape, aws=remote.aws())
    assert seen.outcome == fault.outcome, seen
    return seen


def killed_on_s3(world: World, remote: Remote, rng: random.Random, number: int, shape: Shape = SCORE) -> Seen:
    """Kill the flow at one of its writes: before the server has it, or before the response."""
    running: list[Running] = []
    at = _chosen(world, remote, rng, shape, WRITES)
    return _killed(world, remote, "flow", Plan(at=at, call=lambda: running[0].kill()), number, shape, running)


def trainer_killed_on_s3(world: World, remote: Remote, rng: random.Random, number: int) -> Seen:
    """Kill the trainer at a write of its checkpoints."""
    at = _chosen(world, remote, rng, TRAIN, ("PUT",), "/checkpoints/")  # which may take a store of its own
    store = remote.place(remote.stores + 1)

    def call() -> None:
        for trainer in started(store, "training.worker"):
            os.kill(trainer, signal.SIGKILL)

    plan = Plan(methods=("PUT",), at=at, call=call, within="/checkpoints/")
    return _killed(world, remote, "trainer", plan, number, TRAIN, [])


def _killed(
    world: World, remote: Remote, role: str, plan: Plan, number: int, shape: Shape, running: list[Running]
) -> Seen:
    store = remote.store()
    plan.kind = ("call", "call_after")[number % 2]
    kind = f"SIGKILL of the {role}, S3 write {('under way', 'done')[number % 2]}"
    return world.disturbed(
        kind, store, lambda: _run(world, remote, store, plan, shape, running), shape, aws=remote.aws()
    )


PART_FAULTS = {
    "S3 answers 500 to a part": WENT_ON, "S3 connection cut in a part's body": WENT_ON,
    "S3 parts put together, answer lost": WENT_ON, "SIGKILL of an upload, at a part": "killed",
}  # fmt: skip


def upload_in_parts(world: World, remote: Remote, rng: random.Random, kind: str) -> Seen:
    """Let a part of a multipart upload fail, or kill the sender at one; then upload again."""
    store, file = remote.store(), world.folder / "large"
    if not file.exists():
        file.write_bytes(rng.randbytes(PARTS))
    command = [sys.executable, "-c", UPLOAD, store, str(file)]
    running: list[subprocess.Popen] = []
    plan = {
        "S3 answers 500 to a part": Plan("500", ("PUT",), at=rng.randint(1, 3), times=2),
        "S3 connection cut in a part's body": Plan("cut", ("PUT",), at=rng.randint(1, 3)),
        "S3 parts put together, answer lost": Plan("lost", ("POST",), at=2),
        "SIGKILL of an upload, at a part": Plan("call", ("PUT",), at=rng.randint(1, 3), call=lambda: running[0].kill()),
    }[kind]  # fmt: skip
    began, remote_environment = time.monotonic(), os.environ | remote.aws() | {MARK: store}
    remote.plan(plan)
    try:
        running.append(subprocess.Popen(command, cwd=ROOT, env=remote_environment))
        code = running[0].wait(120)
    finally:
        remote.plan(Plan())
    with environment(remote.aws()):
        storage = Storage(store)
        assert plan.fired and (code == 0) == storage.exists("large"), (code, plan.fired)
        if code:
            assert code == -signal.SIGKILL, (kind, code)
            subprocess.run(command, cwd=ROOT, env=remote_environment, check=True, timeout=120)
        right = storage.digest("large") == digest(file.read_bytes())
        storage.remove("large")
    verdict = Verdict(wrong=[] if right else ["the file differs"])
    seen = Seen(
        kind, "upload", plan.fired[0], code != 0, "killed" if code else WENT_ON, right, time.monotonic() - began,
        verdict, world.left(store),
    )  # fmt: skip
    world.seen.append(seen)
    return seen


def two_machines(world: World, remote: Remote) -> Seen:
    """The same command at once on two machines, which share the store and nothing else: one builds, the other waits
    for its lease and takes what is there."""
    store = remote.store()

    def disturb() -> tuple[int, list[str]]:
        runs = [_on_a_machine(world, remote, store, name) for name in ("a", "b")]
        codes = [running.wait() for running in runs]
        assert codes == [0, 0], [running.said() for running in runs]
        assert any(WAITS in running.said() for running in runs), [running.said() for running in runs]
        outcomes = sorted(running.outcome("train") for running in runs)
        assert outcomes == ["built", "reused"], outcomes
        return max(codes), ["start train/both"]

    return world.disturbed("two machines at once", store, disturb, TRAIN, aws=remote.aws())


def rebuilt_elsewhere(world: World, remote: Remote) -> Seen:
    """Start a rebuild of training on one machine while another trains: both complete."""
    store = remote.store()

    def disturb() -> tuple[int, list[str]]:
        first = _on_a_machine(world, remote, store, "a")
        _trains(remote, store)
        second = _on_a_machine(world, remote, store, "b", replace(TRAIN, rebuild=Stage.TRAIN))
        codes = [first.wait(), second.wait()]
        assert codes == [0, 0], [first.said(), second.said()]
        return max(codes), ["start train/rebuild"]

    return world.disturbed("--rebuild while another machine builds", store, disturb, TRAIN, aws=remote.aws())


def lease_holder_killed(world: World, remote: Remote) -> Seen:
    """Kill the machine that trains while another waits for its lease: the other continues."""
    store = remote.store()

    def disturb() -> tuple[int, list[str]]:
        runs = [_on_a_machine(world, remote, store, name) for name in ("a", "b")]
        waits = f"{WAITS} train"
        until(lambda: any(waits in running.said() for running in runs), "one of them waits")
        _trains(remote, store)
        waiter, holder = sorted(runs, key=lambda running: waits not in running.said())
        holder.kill()
        assert holder.wait() == -signal.SIGKILL, holder.said()
        return waiter.wait(), ["kill train/lease"]

    kind = "SIGKILL of the one of two machines that builds"
    return world.disturbed(kind, store, disturb, TRAIN, aws=remote.aws())


def lease_fails(world: World, remote: Remote, rng: random.Random, kind: str) -> Seen:
    """Disturb a request for a lease."""
    store, at = remote.store(), rng.randint(1, 3)  # each of three stages takes one
    plan = LEASE_FAULTS[kind](at)
    return world.disturbed(kind, store, lambda: _run(world, remote, store, plan, SCORE, []), aws=remote.aws())


def _on_a_machine(world: World, remote: Remote, store: str, name: str, shape: Shape = TRAIN) -> Running:
    home = world.folder / f"home-{name}"
    home.mkdir(exist_ok=True)
    return world.start(store, shape, aws=remote.aws(), home=home)


def _trains(remote: Remote, store: str) -> None:
    """Wait until there is a checkpoint."""
    with environment(remote.server.environment()):
        storage = Storage(store)
        until(lambda: any("/checkpoints/" in name for name in storage.names("train")), "a checkpoint")


def _chosen(
    world: World, remote: Remote, rng: random.Random, shape: Shape, methods: tuple[str, ...], within: str = ""
) -> int:
    """Return a seeded number of an undisturbed run's requests; in a run that trains, during training."""
    sent = [r for r in _counted(world, remote, shape) if r.split(" ")[0] in methods and within in r]
    trains = [n for n, request in enumerate(sent, 1) if stage_of(request) == Stage.TRAIN]
    return rng.choice(trains) if shape.until == Stage.TRAIN and trains else rng.randint(1, len(sent))


def _counted(world: World, remote: Remote, shape: Shape) -> list[str]:
    """Return an undisturbed run's requests as "method path", in order."""
    if shape not in remote.counted:
        plan, store = Plan("count", (*WRITES, "GET"), times=1_000_000), remote.store()
        code, fired = _run(world, remote, store, plan, shape, [])
        assert code == 0
        remote.counted[shape] = fired
    return remote.counted[shape]


def _run(
    world: World, remote: Remote, store: str, plan: Plan, shape: Shape, running: list[Running]
) -> tuple[int, list[str]]:
    remote.plan(plan)
    try:
        running.append(world.start(store, shape, aws=remote.aws()))
        return running[0].wait(), plan.fired
    finally:
        remote.plan(Plan())
