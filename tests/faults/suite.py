"""`make test-faults`: real pipelines, killed and disturbed at seeded moments. SEED chooses them; a report is printed.

Not named test_*: `make test-all` leaves it out, tests/faults/test_short.py runs a selection.
"""

import os
import random
from collections.abc import Iterator

import pytest

from tests.faults import cases, proxy, report, served
from tests.faults.world import Remote, Seen, World
from tests.s3 import S3

SEED = int(os.environ.get("SEED", "0"))
STAGES = ("data", "mask", "responses", "verdicts", "score")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """At its end the report of what was seen in it."""
    made = World(tmp_path_factory.mktemp("faults") / "world")
    try:
        yield made
    finally:
        made.close()
        print(report.keep(SEED, made.seen))


@pytest.fixture(autouse=True)
def _kept(world: World) -> Iterator[None]:
    """What was seen is written down after each test: a suite that is ended early has told the truth so far."""
    yield
    report.keep(SEED, world.seen)


@pytest.fixture(scope="module")
def remote(s3: S3) -> Iterator[Remote]:
    with proxy.serve(s3.url) as between:
        yield Remote(s3, between)


@pytest.fixture(scope="module")
def commands(world: World) -> Iterator[served.Commands]:
    servers = served.Servers(world.folder / "servers")
    try:
        yield served.Commands(world, servers)
    finally:
        servers.close()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(f"{SEED} {request.node.name}")


def right(seen: Seen | list[Seen]) -> None:
    for one in seen if isinstance(seen, list) else [seen]:
        assert one.recovered and one.verdict.right and one.left == 0, one


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("stage", STAGES)
def test_the_flow_is_killed(world: World, rng: random.Random, stage: str, number: int) -> None:
    right(cases.killed(world, rng, "flow", stage, number, train=False))


@pytest.mark.parametrize("number", range(6))
def test_the_flow_is_killed_on_s3(world: World, remote: Remote, rng: random.Random, number: int) -> None:
    right(cases.killed_on_s3(world, remote, rng, number))


@pytest.mark.parametrize("kind", cases.S3_FAULTS)
def test_s3_fails(world: World, remote: Remote, rng: random.Random, kind: str) -> None:
    right(cases.s3_fault(world, remote, rng, kind))


@pytest.mark.parametrize("number", range(4))
def test_the_flow_is_killed_while_it_trains(world: World, rng: random.Random, number: int) -> None:
    right(cases.killed(world, rng, "flow", "train", number, train=True))


@pytest.mark.parametrize("number", range(6))
def test_the_trainer_is_killed(world: World, rng: random.Random, number: int) -> None:
    right(cases.killed(world, rng, "trainer", "train", number, train=True))


def test_it_is_killed_again_and_again(world: World, rng: random.Random) -> None:
    right(cases.killed_often(world, rng, 10))


@pytest.mark.parametrize("what", ["full", "readonly"])
@pytest.mark.parametrize("role", ["flow", "trainer"])
def test_the_disk_fails(world: World, rng: random.Random, what: str, role: str) -> None:
    right(cases.disk(world, rng, what, role))


def test_a_small_disk_is_full(world: World, rng: random.Random) -> None:
    seen = cases.small_disk(world, rng)
    if seen is None:
        pytest.skip("no file system may be mounted here")
    right(seen)


@pytest.mark.parametrize(("jump", "train"), [(cases.DAY, True), (-cases.DAY, True), (cases.DAY, False)])
def test_the_clock_jumps(world: World, rng: random.Random, jump: float, train: bool) -> None:
    right(cases.clock(world, rng, jump, train))


def test_two_runs_at_once(world: World) -> None:
    right(cases.two_at_once(world))


def test_the_one_that_builds_is_killed(world: World) -> None:
    right(cases.holder_killed(world))


def test_the_newest_checkpoint_is_damaged(world: World, rng: random.Random) -> None:
    right(cases.damaged_checkpoint(world, rng))


@pytest.mark.parametrize(("name", "seconds"), [("prefect", 15.0), ("mlflow", 60.0)])
def test_a_server_is_away(commands: served.Commands, name: str, seconds: float) -> None:
    right(served.server_away(commands, name, seconds))
    known, steps = served.metrics_kept(commands)
    assert known == steps  # none is lost, though some come late


def test_a_whole_distillation_is_killed(commands: served.Commands, rng: random.Random) -> None:
    seen = served.with_engines(commands, rng)
    right(seen)
    assert len(seen) == 3  # the run, an engine, the trainer


def test_enough_was_injected(world: World) -> None:
    """The contract of `make test-faults`."""
    assert sum(seen.signal for seen in world.seen) >= report.KILLS
    assert len({seen.kind.split(",")[0] for seen in world.seen}) >= 12
