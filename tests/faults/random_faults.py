"""`make test-faults`: real pipelines, killed and disturbed at seeded moments. SEED chooses them; a report is printed.

Not named test_*: `make test-all` leaves it out, tests/faults/test_selected_faults.py runs a selection.
"""

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from masters.common import disk_space
from tests import fake_judge
from tests.command_line import masters
from tests.faults import (
    command_faults,
    concurrent_runs,
    process_faults,
    proxy,
    rebuild_faults,
    report,
    s3_faults,
    worker_faults,
)
from tests.faults.conftest import WHOLE
from tests.faults.disturbed_runs import REGISTER, SCORE, TRAIN, TWO_RANKS, Seen, World
from tests.faults.run_spec import Shape
from tests.faults.s3_faults import Remote
from tests.s3_server import S3

DAY = process_faults.DAY
SEED = int(os.environ.get("SEED", "0"))
STAGES = ("data", "mask", "responses", "verdicts", "score")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("faults") / "world")
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def keep(world: World, request: pytest.FixtureRequest) -> Iterator[Callable[[str], None]]:
    """Store what was seen, with the name of the test."""
    ran: set[str] = set()

    def add(test: str) -> None:
        ran.add(test)
        report.keep(SEED, world.seen, ran, request.config.stash[WHOLE])

    yield add


@pytest.fixture(autouse=True)
def _kept(keep: Callable[[str], None], request: pytest.FixtureRequest) -> Iterator[None]:
    """Store results after each test, so that an interrupted suite keeps those so far."""
    yield
    keep(request.node.name)


@pytest.fixture(scope="module")
def far(s3: S3) -> Iterator[Remote]:
    with proxy.serve(s3.url) as between:
        yield Remote(s3, between)


@pytest.fixture(scope="module")
def commands(world: World) -> Iterator[command_faults.Commands]:
    servers = command_faults.Servers(world.folder / "servers")
    try:
        yield command_faults.Commands(world, servers)
    finally:
        servers.close()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(f"{SEED} {request.node.name}")


@pytest.fixture(scope="module")
def judged() -> Iterator[Shape]:
    with fake_judge.serve() as server:
        yield Shape(judge=server.url)


def right(seen: Seen | list[Seen], outcome: str | None = None) -> None:
    """Check what was seen. `outcome` is the expected outcome of the disturbed run, if it is determined."""
    for one in seen if isinstance(seen, list) else [seen]:
        assert one.recovered and one.verdict.right and one.left == 0, one
        assert outcome in (None, one.outcome), one


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("stage", STAGES)
def test_the_flow_is_killed(world: World, rng: random.Random, stage: str, number: int) -> None:
    right(process_faults.killed(world, rng, "flow", stage, number), "killed")


@pytest.mark.parametrize("number", range(3))
def test_the_flow_is_killed_while_it_trains(world: World, rng: random.Random, number: int) -> None:
    right(process_faults.killed(world, rng, "flow", "train", number, TRAIN), "killed")


@pytest.mark.parametrize("number", range(5))
def test_the_trainer_is_killed(world: World, rng: random.Random, number: int) -> None:
    right(process_faults.killed(world, rng, "trainer", "train", number, TRAIN), "failed")


@pytest.mark.parametrize(("role", "number"), [("trainer", 0), ("second trainer", 1), ("second trainer", 2)])
def test_one_of_two_trainers_is_killed(world: World, rng: random.Random, role: str, number: int) -> None:
    right(process_faults.killed(world, rng, role, "train", number, TWO_RANKS), "failed")


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("stage", ["evaluate", "register"])
def test_the_flow_is_killed_at_the_end(world: World, rng: random.Random, stage: str, number: int) -> None:
    right(process_faults.killed_at_the_end(world, rng, stage, number, REGISTER), "killed")


@pytest.mark.parametrize("number", range(3))
def test_the_judge_is_killed(world: World, judged: Shape, rng: random.Random, number: int) -> None:
    right(process_faults.killed(world, rng, "judge", ("score", "shards"), number, judged), "failed")


def test_the_run_is_killed_repeatedly(world: World, rng: random.Random) -> None:
    seen = process_faults.killed_often(world, rng, 8)
    right(seen)
    assert len(seen) == 8


@pytest.mark.parametrize("number", range(4))
def test_the_flow_is_killed_on_s3(world: World, far: Remote, rng: random.Random, number: int) -> None:
    right(s3_faults.killed_on_s3(world, far, rng, number), "killed")


@pytest.mark.parametrize("number", range(2))
def test_the_flow_is_killed_on_s3_while_it_trains(world: World, far: Remote, rng: random.Random, number: int) -> None:
    right(s3_faults.killed_on_s3(world, far, rng, number, TRAIN), "killed")


@pytest.mark.parametrize("number", range(2))
def test_the_trainer_is_killed_on_s3(world: World, far: Remote, rng: random.Random, number: int) -> None:
    right(s3_faults.trainer_killed_on_s3(world, far, rng, number), "failed")


@pytest.mark.parametrize("kind", s3_faults.S3_FAULTS)
def test_s3_fails(world: World, far: Remote, rng: random.Random, kind: str) -> None:
    right(s3_faults.s3_fault(world, far, rng, kind))


TRAINED_THROUGH = (
    "S3 answers 500", "S3 answers 503 SlowDown", "S3 connection cut in an answer's body",
    "S3 connection cut in a request's body", "S3 write done, answer lost",
)  # fmt: skip


@pytest.mark.parametrize("kind", TRAINED_THROUGH)
def test_s3_fails_while_it_trains(world: World, far: Remote, rng: random.Random, kind: str) -> None:
    right(s3_faults.s3_fault(world, far, rng, kind, TRAIN))


@pytest.mark.parametrize("kind", s3_faults.PART_FAULTS)
def test_an_upload_in_parts_fails(world: World, far: Remote, rng: random.Random, kind: str) -> None:
    right(s3_faults.upload_in_parts(world, far, rng, kind), s3_faults.PART_FAULTS[kind])


@pytest.mark.parametrize("what", ["full", "readonly"])
@pytest.mark.parametrize("role", ["flow", "trainer"])
def test_the_disk_fails(world: World, rng: random.Random, what: str, role: str) -> None:
    right(process_faults.disk(world, rng, what, role), "failed")


def test_a_small_disk_is_full(world: World, rng: random.Random) -> None:
    seen = process_faults.small_disk(world, rng)
    if seen is None:
        pytest.skip("no file system may be mounted here")
    right(seen, "failed")


@pytest.mark.parametrize("what", ["store", "home"])
def test_a_small_disk_with_a_database_is_full(what: str, rng: random.Random, tmp_path: Path) -> None:
    """The command says so in its last line, at once and without a library's traceback; with room it goes on.

    The database of MLflow lies in the store, that of Prefect in the home folder.
    """
    kib = rng.randint(300, 1200) if what == "store" else rng.randint(800, 2300)
    with process_faults.mounted(tmp_path / "disk", kib) as disk:
        if disk is None:
            pytest.skip("no file system may be mounted here")
        places = {"store": tmp_path / "store", "home": tmp_path / "home", what: disk / what}
        arguments = ("stage", "data", "configs/demo.toml", "--set", f"store.root={places['store']}")
        done = masters(*arguments, home=places["home"])
        assert done.returncode in (1, 2), done.stdout
        last = done.stderr.splitlines()[-1]
        assert last.startswith("masters: ") and last.endswith(disk_space.REMEDY)
        assert "Traceback" not in done.stderr and "unexpected" not in done.stderr
        subprocess.run(["mount", "-o", "remount,size=512m", str(disk)], check=True)
        done = masters(*arguments, home=places["home"])
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("jump", "role", "shape"),
    [
        (DAY, "flow", TRAIN), (-DAY, "flow", SCORE), (-DAY, "trainer", TRAIN),
        (DAY, "second trainer", TWO_RANKS), (DAY, "flow", REGISTER), (-DAY, "flow", REGISTER),
    ],
    ids=["flow and its trainer", "flow", "trainer", "second trainer", "forward at the end", "back at the end"],
)  # fmt: skip
def test_the_clock_jumps(world: World, rng: random.Random, jump: float, role: str, shape: Shape) -> None:
    right(process_faults.clock(world, rng, jump, role, shape), "went on")


@pytest.mark.parametrize("jump", [DAY, -DAY], ids=["forward", "back"])
def test_the_judges_clock_jumps(world: World, judged: Shape, rng: random.Random, jump: float) -> None:
    right(process_faults.clock(world, rng, jump, "judge", judged), "went on")


def test_two_runs_at_once(world: World) -> None:
    right(concurrent_runs.two_at_once(world), "went on")


def test_two_machines_at_once(world: World, far: Remote) -> None:
    right(s3_faults.two_machines(world, far), "went on")


def test_one_machine_rebuilds_while_the_other_builds(world: World, far: Remote) -> None:
    right(s3_faults.rebuilt_elsewhere(world, far), "went on")


def test_the_machine_that_builds_is_killed(world: World, far: Remote) -> None:
    right(s3_faults.lease_holder_killed(world, far), "went on")


@pytest.mark.parametrize("kind", s3_faults.LEASE_FAULTS)
def test_a_lease_fails(world: World, far: Remote, rng: random.Random, kind: str) -> None:
    right(s3_faults.lease_fails(world, far, rng, kind), "went on")


def test_one_run_rebuilds_while_the_other_builds(world: World) -> None:
    right(concurrent_runs.rebuilt_at_once(world), "went on")


def test_the_run_that_builds_is_killed(world: World) -> None:
    right(concurrent_runs.holder_killed(world), "went on")


def test_the_newest_checkpoint_is_damaged(world: World, rng: random.Random) -> None:
    right(process_faults.damaged_checkpoint(world, rng), "went on")


@pytest.mark.parametrize("number", range(2))
def test_a_run_that_rebuilds_is_killed(world: World, rng: random.Random, number: int) -> None:
    right(rebuild_faults.rebuild_killed(world, rng, number), "killed")


@pytest.mark.parametrize("how", ["empty", "cut short"])
def test_a_shard_is_damaged(world: World, rng: random.Random, how: str) -> None:
    right(rebuild_faults.damaged_shard(world, rng, how), "failed")


@pytest.mark.parametrize(("name", "seconds"), [("prefect", 15.0), ("mlflow", 60.0)])
def test_a_server_is_restarted(commands: command_faults.Commands, name: str, seconds: float) -> None:
    right(command_faults.server_away(commands, name, seconds), "went on")
    known, steps = command_faults.metrics_kept(commands)
    assert known == steps  # none is lost, though some come late


def test_a_whole_distillation_is_killed(commands: command_faults.Commands, rng: random.Random) -> None:
    seen = command_faults.with_engines(commands, rng)
    right(seen)
    assert [one.outcome for one in seen] == ["killed", *["went on"] * 3]  # the run; two engines, the trainer


def test_the_prefect_worker_is_killed(world: World) -> None:
    right(worker_faults.worker_killed(world), "went on")


def test_enough_was_injected(world: World) -> None:
    """Check the contract of `make test-faults`; with a suite in parts, after the last part."""
    rows = report.kept(SEED)["rows"]
    assert report.kills(rows) >= report.KILLS and report.kinds(rows) >= report.KINDS
    assert not report.wrong(rows)
