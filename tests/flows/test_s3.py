"""The pipeline with its store on S3: a real server, as a user runs it, from two machines that share only the store."""

import json
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from masters.checks.model_folder import download_student
from masters.checks.preflight import Resources
from masters.common.errors import InputError
from masters.common.hashing import digest
from masters.store.artifacts import Artifact, Identity
from masters.store.storage import Storage
from masters.tasks.run_context import Context, Run
from masters.tracking.locations import check_tracking_uri
from tests import command_line
from tests.command_line import ROOT, options, read_json
from tests.s3_server import BUCKET, S3, serve
from tests.shape_data import write_questions
from tests.tracked_run import make_config

PREFIX = f"s3://{BUCKET}/a team's/pipeline"
STAGES = ["data", "mask", "generate", "score", "train", "evaluate", "register"]


def masters(
    *arguments: str, place: Path, machine: str, aws: dict[str, str], root: str = PREFIX
) -> subprocess.CompletedProcess:
    """Run a command on a "machine", which has a home and a working folder of its own."""
    home, here = place / machine / "home", place / machine / "here"
    for folder in (home, here):
        folder.mkdir(parents=True, exist_ok=True)
    values = {
        "data.source": place / "data" / "questions.jsonl",
        "data.max_rejected_share": 0.2,
        "store.root": root,
        "student.model": ROOT / "demo/models/student",
        "teachers.0.model": ROOT / "demo/models/teacher",
        "train.epochs": 1,
        "train.questions_per_step": 4,
        "runtime.checkpoint_steps": 3,
        "runtime.train_processes": 2,
    }
    words = (arguments[0], str(ROOT / "configs/easyvqa.toml"), *options(values), *arguments[1:])
    return command_line.masters(*words, home=home, here=here, **aws)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("s3-pipeline")
    write_questions(folder / "data", 48)
    return folder


@pytest.fixture(scope="module")
def aws(s3: S3, prefect: dict[str, str]) -> dict[str, str]:
    """Return a user's environment variables, with one Prefect server for all runs."""
    return s3.environment() | prefect


@pytest.fixture(scope="module")
def first(place: Path, aws: dict[str, str]) -> dict:
    return read_json(masters("distill", "--json", place=place, machine="first", aws=aws))


@pytest.fixture(scope="module")
def store(s3: S3, first: dict) -> Iterator[Storage]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment().items():
            patch.setenv(name, value)
        yield Storage(PREFIX)


def versions(place: Path, machine: str) -> list[tuple[str, int]]:
    """Return the registered model versions in a machine's tracking database."""
    with sqlite3.connect(place / machine / "here" / "mlflow.db") as database:
        return database.execute("select name, version from model_versions").fetchall()


@pytest.mark.slow
class TestPipeline:
    def test_every_stage_is_built_on_s3(self, first: dict, store: Storage, place: Path) -> None:
        assert [(s["name"], s["outcome"]) for s in first["stages"]] == [(name, "built") for name in STAGES]
        assert all(s["uri"].startswith(f"{PREFIX}/{s['name']}/") for s in first["stages"])
        assert json.loads(store.read("summary.json")) == first
        train = next(s for s in first["stages"] if s["name"] == "train")
        assert train["processes"] == 2 and train["steps"] > 3

    def test_records_list_what_is_there_and_nothing_else(self, first: dict, store: Storage) -> None:
        for stage in first["stages"]:
            folder = stage["uri"].removeprefix(f"{PREFIX}/")
            listed = [f["name"] for f in json.loads(store.read(f"{folder}/record.json"))["files"]]
            assert store.names(folder) == sorted(f"{folder}/{name}" for name in [*listed, "record.json"])

    def test_the_run_is_tracked_in_the_working_folder(self, first: dict, place: Path) -> None:
        here = place / "first" / "here"
        assert first["mlflow"]["tracking_uri"] == f"sqlite:///{here / 'mlflow.db'}"  # found from anywhere
        assert {p.name for p in here.iterdir()} == {"mlflow.db", "mlruns"}
        assert versions(place, "first") == [("easyvqa", 1)]

    def test_another_machine_reuses_everything(self, first: dict, place: Path, aws: dict[str, str]) -> None:
        plan = masters("distill", "--plan", "--json", place=place, machine="planner", aws=aws)
        assert {s["outcome"] for s in read_json(plan)["stages"]} == {"reused"}
        again = read_json(masters("distill", "--json", place=place, machine="second", aws=aws))
        assert {s["outcome"] for s in again["stages"]} == {"reused"}
        assert [s["fingerprint"] for s in again["stages"]] == [s["fingerprint"] for s in first["stages"]]
        assert again["student"] == first["student"]
        assert versions(place, "second") == [("easyvqa", again["mlflow"]["model_version"])]  # its MLflow knows it too

    def test_the_student_loads_in_transformers(self, first: dict, store: Storage, tmp_path: Path) -> None:
        from PIL import Image
        from transformers import AutoModelForImageTextToText, AutoProcessor

        uri = first["student"]["after"]["uri"]
        folder = store.download(uri.removeprefix(f"{PREFIX}/"), tmp_path / "student")
        assert (folder / "README.md").read_text().startswith("---")
        model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
        processor = AutoProcessor.from_pretrained(folder)
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is there a circle?"}]}
        text = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[text], images=[Image.new("RGB", (64, 64))], return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer.strip() in ("yes", "no")

    def test_a_store_that_no_longer_lets_write_is_refused(
        self, first: dict, place: Path, s3: S3, aws: dict[str, str]
    ) -> None:
        done = masters("distill", place=place, machine="reader", aws=aws | s3.environment("reader"))
        refused(done, "Access Denied", place)


def refused(done: subprocess.CompletedProcess, why: str, place: Path, machine: str = "reader") -> None:
    """Check for one line and exit code 2, and that nothing was started: only what a check leaves exists."""
    assert done.returncode == 2, done.stderr[-3000:]
    [line] = done.stderr.strip().splitlines()
    assert why in line and PREFIX in line
    kept = place / machine / "home" / ".cache" / "masters"
    assert not kept.exists() or {path.name for path in kept.iterdir()} <= {"sound", "work"}
    assert not (place / machine / "here" / "mlflow.db").exists()


@pytest.mark.slow
def test_an_unreachable_store_is_refused(place: Path, tmp_path: Path) -> None:
    with serve(tmp_path / "gone") as server:
        ready = masters("check", place=place, machine="gone", aws=server.environment())
        assert ready.returncode == 0, ready.stderr
        assert f"store      {PREFIX}: read, write, conditional write" in ready.stdout
    done = masters("distill", place=place, machine="gone", aws=server.environment())
    refused(done, "Could not connect to the endpoint URL", place, "gone")


def test_check_refuses_a_store_with_wrong_keys(place: Path, s3: S3) -> None:
    aws = s3.environment() | {"AWS_SECRET_ACCESS_KEY": "guessed"}
    done = masters("check", place=place, machine="check", aws=aws)
    refused(done, "signature", place, "check")
    assert "AWS_*" in done.stderr


def test_a_rebuilt_student_is_downloaded_again(tmp_path: Path, context: Callable[[str], Run]) -> None:
    """A rebuild may give other weights under the same identity; the earlier copy must not be used."""
    run, folders = context(f"s3://{BUCKET}/again"), []
    for weights in (b"first", b"second"):
        run.storage.write("train/x-1/model/weights", weights)
        trained = Artifact(run.storage, "train/x-1", {"files": [dict(name="model/weights", digest=digest(weights))]})
        folders.append(download_student(trained))
    assert [(folder / "weights").read_bytes() for folder in folders] == [b"first", b"second"]
    assert all(folder.is_relative_to(tmp_path / ".cache") for folder in folders)


def test_two_stores_have_different_work_folders(context: Callable[[str], Run]) -> None:
    """Job files name their store, and the same stage has the same identity in both stores."""
    identity = Identity("train", 1, {}, {})
    folders = {context(f"s3://{BUCKET}/{store}").work_folder(identity) for store in ("one", "two")}
    assert len(folders) == 2 and all(folder.is_dir() for folder in folders)


def test_a_read_only_working_folder_is_refused_for_tracking(
    context: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/proc")
    storage = context(f"s3://{BUCKET}/one").storage
    with pytest.raises(InputError, match="database /proc/mlflow.db, cannot be written.*or start in another folder"):
        check_tracking_uri(make_config(storage.uri("")), storage)


@pytest.fixture
def context(s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Run]:
    """Return a function that makes a run in which only the store is real."""
    for name, value in (s3.environment() | {"HOME": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)

    def make(root: str) -> Run:
        nothing: Any = None
        tracker: Any = SimpleNamespace(key="0")
        return Run(Context(nothing, Resources(Storage(root), nothing, nothing, [], ())), tracker)

    return make
