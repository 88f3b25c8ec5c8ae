"""A run on two Ray engines and two FSDP ranks, one of each killed, gives the results of a plain run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from masters.execution.ray_engines.guard import session_processes
from tests.command_line import ROOT, environment, options, rows
from tests.listening_sockets import addresses, reachable
from tests.shape_data import write_questions

pytestmark = pytest.mark.slow  # twice a whole run
ONE = dict(generate_workers=1, train_processes=1)
TWO = dict(generate_workers=2, train_processes=2, ray_address="local", sharding="fsdp2")
LIMIT = 600
DASHBOARD = 8265
TRAIN, TEST = 48, 16  # of the questions


def start(place: Path, name: str, runtime: dict, prefect: dict[str, str]) -> subprocess.Popen:
    values = {
        "data.source": place / "data/questions.jsonl",
        "store.root": place / name,
        "train.epochs": 1,
        "train.questions_per_step": 2,
        "runtime.checkpoint_steps": 4,
        "runtime.mlflow_uri": f"sqlite:///{place}/{name}.db",
        **{f"runtime.{key}": value for key, value in runtime.items()},
    }
    command = [sys.executable, "-m", "masters.cli", "distill", "configs/easyvqa.toml", *options(values), "--json"]
    given = environment(place / "home", **prefect, MASTERS_PYTHON=sys.executable)  # their ranks are found and killed
    with open(place / f"{name}.log", "wb") as log:
        return subprocess.Popen(command, cwd=ROOT, env=given, stdout=subprocess.PIPE, stderr=log)


def lines(place: Path, pattern: str, event: str) -> list[dict]:
    """Return the events of a kind that processes of the run on two engines and ranks reported."""
    whole = [line for file in place.glob(f"two/.work/{pattern}") for line in file.read_text().splitlines(True)]
    return [output for line in whole if line.endswith("\n") and (output := json.loads(line))["event"] == event]


def once(condition: Callable[[], object], run: subprocess.Popen, place: Path) -> None:
    ends = time.monotonic() + LIMIT
    while not condition():
        assert run.poll() is None and time.monotonic() < ends, (place / "two.log").read_text()[-3000:]
        time.sleep(0.02)


def teachers_engine(place: Path) -> list[int]:
    """Return the process ids of the teacher's engine, empty before it starts."""
    started = lines(place, "generate-*/ray.progress", "engine")
    return [line["pid"] for line in started if line["model"].startswith("teacher")]


def driver(place: Path) -> int:
    return lines(place, "generate-*/ray.progress", "ray")[0]["pid"]


def second_rank(run: subprocess.Popen) -> int:
    found = psutil.Process(run.pid).children(recursive=True)
    return next(p.pid for p in found if "training.worker" in " ".join(p.cmdline()) and p.environ().get("RANK") == "1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scaled")
    write_questions(folder / "data", TRAIN + TEST, bad=False)
    (folder / "home").mkdir()
    return folder


@pytest.fixture(scope="module")
def one(place: Path, prefect: dict[str, str]) -> dict:
    return ended(start(place, "one", ONE, prefect), place / "one.log")


@pytest.fixture(scope="module")
def sockets() -> dict[str, set[tuple[str, int]]]:
    """Listening and externally reachable sockets of Ray and its engines. Filled by the fixture `two`."""
    return {}


@pytest.fixture(scope="module")
def two(place: Path, one: dict, prefect: dict[str, str], sockets: dict) -> dict:
    run = start(place, "two", TWO, prefect)
    once(lambda: teachers_engine(place), run, place)  # killed at once, while it has shards to answer
    os.kill(teachers_engine(place)[0], signal.SIGKILL)
    processes = session_processes(driver(place))
    sockets.update(listened=addresses(processes), reached=reachable(processes))
    once(lambda: len(lines(place, "train-*/rank-0.progress", "step")) > 8, run, place)
    os.kill(second_rank(run), signal.SIGKILL)
    return ended(run, place / "two.log")


def ended(run: subprocess.Popen, log: Path) -> dict:
    output = run.communicate(timeout=LIMIT)[0]
    assert run.returncode == 0, log.read_text()[-3000:]
    return json.loads(output.splitlines()[-1])


def stage(summary: dict, name: str) -> dict:
    return next(stage for stage in summary["stages"] if stage["name"] == name)


def test_the_summary_counts_workers_and_restarts(one: dict, two: dict) -> None:
    generated, trained = stage(two, "generate"), stage(two, "train")
    assert (generated["workers"], generated["restarts"]) == (2, 1) and generated["engines"] >= 2
    assert (trained["processes"], trained["sharding"]) == (2, "fsdp2") and trained["resumed_at_step"] >= 4
    assert (stage(one, "generate")["workers"], stage(one, "train")["processes"]) == (1, 1)


@pytest.mark.parametrize(("name", "table"), [("generate", "responses"), ("score", "verdicts")])
def test_rows_equal_those_of_the_plain_run(one: dict, two: dict, name: str, table: str) -> None:
    assert rows(one, name, table) == rows(two, name, table)


def test_predictions_of_the_same_models_are_equal(one: dict, two: dict) -> None:
    """Teacher and untrained student are evaluated by the engines of `generate`."""
    first, second = (
        [row for row in rows(run, "evaluate", "predictions") if row["model"] != "student-after"] for run in (one, two)
    )
    assert len(first) == 2 * TEST and first == second


def test_no_question_was_answered_twice(place: Path, one: dict, two: dict) -> None:
    models = len({row["source"] for row in rows(one, "generate", "responses")})
    answered = sum(line["questions"] for line in lines(place, "generate-*/ray.progress", "shard"))
    assert answered == models * (TRAIN + TEST)


def test_ray_listened_only_on_loopback_without_a_dashboard_and_has_ended(
    place: Path, two: dict, sockets: dict[str, set[tuple[str, int]]]
) -> None:
    assert sockets["listened"] and sockets["reached"] == set()
    assert DASHBOARD not in {port for _, port in sockets["listened"]}
    assert session_processes(driver(place)) == set()


def test_the_students_are_nearly_equal(one: dict, two: dict) -> None:
    """End weights differ by less than 1 % of the distance traveled."""
    began = load_file(ROOT / "demo/models/student/model.safetensors")
    first, second = (load_file(Path(stage(run, "train")["uri"]) / "model/model.safetensors") for run in (one, two))
    traveled = sum((first[name] - began[name]).square().sum() for name in began) ** 0.5
    apart = sum((first[name] - second[name]).square().sum() for name in began) ** 0.5
    assert traveled > 0 and apart < 0.01 * traveled, (apart / traveled).item()
