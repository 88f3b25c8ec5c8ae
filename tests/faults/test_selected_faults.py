"""A selection of the faults that needs no trainer; all of them: `make test-faults`."""

import random
from collections.abc import Iterator

import pytest

from masters.store import tables
from masters.store.storage import Storage
from tests.faults import process_faults, proxy, s3_faults
from tests.faults.disturbed_runs import SCORE, Seen, World
from tests.faults.s3_faults import Remote
from tests.faults.verify_store import compare
from tests.s3_server import S3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("faults") / "world")
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def far(s3: S3) -> Iterator[Remote]:
    with proxy.serve(s3.url) as between:
        yield Remote(s3, between)


def right(seen: Seen) -> None:
    assert seen.recovered and seen.verdict.right and seen.left == 0, seen


@pytest.mark.parametrize(("stage", "number"), [("data", 0), ("mask", 1), ("score", 2)])
def test_the_flow_is_killed(world: World, stage: str, number: int) -> None:
    right(process_faults.killed(world, random.Random(number), "flow", stage, number))


@pytest.mark.parametrize("kind", ["S3 answers 503 SlowDown", "S3 conditional create done, answer lost"])
def test_s3_fails(world: World, far: Remote, kind: str) -> None:
    right(s3_faults.s3_fault(world, far, random.Random(0), kind))


@pytest.mark.parametrize("what", ["full", "readonly"])
def test_the_disk_fails(world: World, what: str) -> None:
    right(process_faults.disk(world, random.Random(0), what, "flow"))


def test_the_comparison_of_stores_finds_differences(world: World) -> None:
    """It finds lost, duplicate and different rows, changed files and missing artifacts."""
    expected, store = world.expected(SCORE), world.store()
    assert world.start(store).wait() == 0
    storage = Storage(str(store))
    assert compare(expected, storage).right
    [verdicts] = [name for name in storage.names("score") if name.endswith(".parquet")]
    table = tables.decode(storage.read(verdicts))
    rows = table.to_pylist()
    wrong = [rows[0] | dict(score=0.5), rows[1], rows[1], *rows[3:]]
    storage.write(verdicts, tables.encode(wrong, table.schema))
    [record] = [name for name in storage.names("mask") if name.endswith("record.json")]
    storage.remove(record)
    found = compare(expected, storage)
    thresholds = next(len(a["tables"]["thresholds"]) for a in expected.values() if "thresholds" in a["tables"])
    assert (found.lost, found.twice, found.different) == (1 + thresholds, 1, 1)
    assert any("is not what the record says" in w for w in found.wrong)
    assert any("is not finished" in w for w in found.wrong)
