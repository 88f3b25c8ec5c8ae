"""A run with refresh by stage from the command line: uninterrupted, and killed between two mask stages."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from masters.config.mask_schedule import mask_stage_of
from tests.command_line import ROOT, environment, masters, options, read_json, rows
from tests.flows.test_pipeline import processes_of
from tests.local_stack import until
from tests.shape_data import write_questions

pytestmark = pytest.mark.slow
NAMES = [
    "data",
    "mask",
    "generate-mask0",
    "score-mask0",
    "train-mask0",
    "generate-mask1",
    "score-mask1",
    "train-mask1",
    "evaluate",
    "register",
]
KEY = ("question_id", "source", "mask_ratio", "sample")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refresh")
    write_questions(folder / "data", 48, bad=False)
    (folder / "home").mkdir()
    return folder


def arguments(place: Path, store: str, **values: object) -> list[str]:
    own = {
        "data.source": place / "data" / "questions.jsonl",
        "store.root": place / store,
        "generate.refresh": "stage",
        "teachers.0.mask_step": 0.2,
        "train.questions_per_step": 4,
        "train.learning_rate": 1e-3,
        "runtime.generate_workers": 1,
        "runtime.train_processes": 1,
    }
    return ["configs/easyvqa.toml", *options(own | {key.replace("__", "."): value for key, value in values.items()})]


@pytest.fixture(scope="module")
def whole(place: Path) -> dict:
    done = masters("distill", *arguments(place, "whole"), "--json", home=place / "home")
    assert "report is incomplete" not in done.stderr, done.stderr[-3000:]
    return read_json(done)


def stages(summary: dict) -> dict[str, dict]:
    return {stage["name"]: stage for stage in summary["stages"]}


def test_mask_stages_are_generated_scored_and_trained_in_turn(whole: dict) -> None:
    assert [(stage["name"], stage["outcome"]) for stage in whole["stages"]] == [(name, "built") for name in NAMES]
    first, second = (rows(whole, f"generate-mask{n}", "responses") for n in (0, 1))
    digests = {row["question_id"]: row["question_digest"] for row in rows(whole, "data", "questions")}
    for stage, responses in enumerate((first, second)):
        assert {mask_stage_of(digests[row["question_id"]], 2) for row in responses} == {stage}
        assert {row["mask_ratio"] for row in responses if row["source"] == "teacher"} == {[0.2, 0.0][stage]}
        verdicts = rows(whole, f"score-mask{stage}", "verdicts")
        assert {tuple(row[k] for k in KEY) for row in verdicts} == {tuple(row[k] for k in KEY) for row in responses}
    assert {row["model"] for row in second if row["source"] == "student"} == {"student-after"}
    steps = [row["step"] for n in (0, 1) for row in rows(whole, f"train-mask{n}", "history")]
    assert sorted(steps) == list(range(1, len(steps) + 1))


def test_the_students_engine_loads_new_weights_without_a_restart(whole: dict, place: Path) -> None:
    """The teacher's engine also starts once and answers all mask stages."""
    made = stages(whole)
    assert [made[f"generate-mask{n}"]["engines"] for n in (0, 1)] == [2, 0]
    assert made["generate-mask1"]["kept"] == 1 and made["evaluate"]["engines"] == 1
    assert processes_of(place / "home") == []


def test_the_first_mask_stage_equals_that_of_a_whole_round(whole: dict, place: Path) -> None:
    done = masters(
        "stage", "generate", *arguments(place, "whole", generate__refresh="round"), "--json", home=place / "home"
    )
    everything = {tuple(row[k] for k in KEY): row for row in rows(read_json(done), "generate", "responses")}
    first = rows(whole, "generate-mask0", "responses")
    assert first and all(everything[tuple(row[k] for k in KEY)] == row for row in first)


def test_lineage_plan_and_garbage_collection_know_every_mask_stage(whole: dict, place: Path) -> None:
    found = read_json(masters("lineage", "easyvqa", "--json", home=place / "home"))
    assert found["verified"] and {stage["name"] for stage in found["stages"]} == set(NAMES)
    read = {stage["name"]: {each["role"] for each in stage["inputs"]} for stage in found["stages"]}
    assert "earlier" in read["train-mask1"] and "earlier" not in read["train-mask0"]
    kept = read_json(masters("gc", *arguments(place, "whole"), "--json", home=place / "home"))
    assert not {item["uri"] for item in kept["items"]} & {stage["uri"] for stage in whole["stages"]}
    planned = masters("distill", *arguments(place, "whole"), "--plan", home=place / "home")
    assert [line.split()[:2] for line in planned.stdout.splitlines()] == [[name, "reused"] for name in NAMES]


def test_a_run_killed_between_mask_stages_continues_to_the_same_student(whole: dict, place: Path) -> None:
    home = place / "other-home"
    home.mkdir()
    command = [sys.executable, "-m", "masters.cli", "distill", *arguments(place, "killed"), "--json"]
    with open(place / "killed.log", "wb") as log:
        running = subprocess.Popen(
            command, cwd=ROOT, env=environment(home), stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + 1500
    while not list((place / "killed").glob("train/*/record.json")):
        assert running.poll() is None and time.monotonic() < deadline, (place / "killed.log").read_text()[-3000:]
        time.sleep(0.1)
    assert any("generation.worker" in line for line in processes_of(home))  # the student's engine waits
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    until(lambda: not any("generation.worker" in line for line in processes_of(home)), "the engine to be gone")
    done = masters("distill", *arguments(place, "killed"), "--json", home=home)
    again = read_json(done)
    outcomes = {name: stage["outcome"] for name, stage in stages(again).items()}
    assert [outcomes[name] for name in NAMES[:5]] == ["reused"] * 5 and outcomes["train-mask1"] == "built"
    assert stages(again)["generate-mask1"]["engines"] <= 1  # again, on the weights that the first stage ended with
    for name in ("generate-mask1", "train-mask1", "register"):
        assert stages(again)[name]["fingerprint"] == stages(whole)[name]["fingerprint"]
    students = [Path(made["student"]["after"]["uri"], "model.safetensors").read_bytes() for made in (whole, again)]
    assert students[0] == students[1]
