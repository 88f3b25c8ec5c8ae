"""Real engines on a real Ray: one is killed in mid-run, and every row is what one engine at a time makes."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from ray import exceptions

from masters import engines, processes, schemas, shards
from masters.models.ray_guard import session
from masters.models.ray_worker import Pool
from masters.tasks import evaluate
from masters.tasks.data import data
from masters.tasks.generate import generate
from masters.tasks.mask import mask
from masters.tasks.stage import Run
from tests.drawn import write_questions
from tests.listening import addresses, reachable
from tests.trained import first_round, made_run

pytestmark = pytest.mark.slow  # five starts of an engine

DASHBOARD = 8265


@dataclass
class Watch:
    """Hears the driver's lines; kills the first engine that has answered a shard."""

    lines: list[dict] = field(default_factory=list)
    listened: set[tuple[str, int]] = field(default_factory=set)
    reached: set[tuple[str, int]] = field(default_factory=set)

    def hear(self, line: dict) -> None:
        self.lines.append(line)
        kinds = [said["event"] for said in self.lines]
        if line["event"] == "shard" and kinds.count("shard") == 1:
            self.look()
            os.kill(next(said["pid"] for said in self.lines if said["event"] == "engine"), signal.SIGKILL)

    def look(self) -> None:
        ours = session(self.driver)
        self.listened |= addresses(ours)
        self.reached |= reachable(ours)

    @property
    def driver(self) -> int:
        return next(said["pid"] for said in self.lines if said["event"] == "ray")


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch, run = Watch(), processes.run

    def watched(children: list, at_once: int, hear: Callable, *rest: object):
        def both(name: str, line: dict) -> None:
            if name == "ray":
                watch.hear(line)
            hear(name, line)

        return run(children, at_once, both, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(engines.processes, "run", watched)
    return watch


def answers(run: Run) -> tuple[list[dict], list[dict], dict]:
    """Rows of `responses`, of the predictions that are made with them, and the stage's line of the summary."""
    current, questions = first_round(run), data.fn(run)
    ahead = evaluate.ahead(run, current, questions)
    made = generate.fn(run, current, questions, mask.fn(run, current), ahead)
    return list(made.rows("responses")), list(_predictions(run)), run.stages[-1]


def _predictions(run: Run) -> Iterator[dict]:
    for name in run.storage.names("shards/predictions"):
        yield from schemas.read(run.storage, name).to_pylist()


def test_rows_are_one_engines_though_one_of_two_is_killed(
    tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "plan", partial(shards.plan, limit=4))
    source, fast = write_questions(tmp_path / "source", 64, bad=False), dict(dtype="float32")
    one = answers(made_run(tmp_path / "one", source, generate=fast, runtime=dict(max_model_len=512)))
    on_ray = dict(generate_workers=2, ray_address="local", max_model_len=512)
    two = answers(made_run(tmp_path / "two", source, generate=fast, runtime=on_ray))

    assert len(one[0]) == 48 * 2 and one[0] == two[0]
    assert len(one[1]) == 16 * 2 and one[1] == two[1]
    assert {row["model"] for row in one[1]} == {"teacher", "student-before"}
    assert (two[2]["workers"], two[2]["restarts"], two[2]["engines"]) == (2, 1, len(two[2]["startup_seconds"]))
    assert sum(line.get("questions", 0) for line in watch.lines) == 48 * 2 + 16 * 2  # nothing was answered twice
    assert watch.listened and watch.reached == set()
    assert DASHBOARD not in {port for _, port in watch.listened}
    assert session(watch.driver) == set()


@pytest.mark.parametrize("error", [exceptions.RayActorError(), exceptions.OutOfMemoryError("the node is full")])
def test_an_engine_that_dies_or_that_ray_ends_for_memory_is_replaced(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(_: object) -> None:
        raise error

    pool, lost = object.__new__(Pool), []
    monkeypatch.setattr("ray.get", get)
    monkeypatch.setattr(Pool, "_lost", lambda _, seat, why: lost.append((seat, why)))
    pool._hear("seat", None)  # pyright: ignore[reportArgumentType]
    assert lost == [("seat", error)]
