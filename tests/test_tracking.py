"""Where a run is tracked, and what it says about a stage's inputs and outputs. MLflow on SQLite."""

import os
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from masters import machine, tracking
from masters.artifacts import Identity, load
from masters.errors import InputError, TrackingError
from masters.flows.nightly import night
from masters.identity import digest
from masters.storage import Storage
from masters.tracking import Tracker
from tests.tracked import NAME, configured, registered, staged


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own: tracking remembers there."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    (tmp_path / "store").mkdir()
    return Storage(str(tmp_path / "store"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tracker, int]:
    """A run that tests only look at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        return registered(Storage(str(tmp_path_factory.mktemp("finished"))))


def stage_run(tracker: Tracker, stage: str) -> Run:
    client = MlflowClient(tracker.uri)
    return client.get_run(client.get_run(tracker.run_id).data.tags[f"stage.{stage}.run_id"])


def test_a_server_that_does_not_answer_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9 does not answer.*runtime\.mlflow_uri"):
        Tracker(configured(tmp_path, mlflow_uri="http://127.0.0.1:9"), Storage(str(tmp_path)))


def test_so_is_it_by_a_night_which_asks_for_the_champion_first(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9 does not answer"):
        night(configured(tmp_path, mlflow_uri="http://127.0.0.1:9"))
    assert time.monotonic() - began < 20


def test_a_password_in_the_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI") as caught:
        Tracker(configured(tmp_path, mlflow_uri="http://me:hunter2@127.0.0.1:9"), Storage(str(tmp_path)))
    assert "hunter2" not in str(caught.value)


def test_by_default_everything_lies_beside_the_artifacts(storage: Storage, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert registered(storage)[1] == 1
    assert registered(storage)[1] == 1  # the same student is one version
    assert registered(storage, b"other")[1] == 2
    assert (tmp_path / "store/mlflow.db").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"store", "home"}  # nothing in the working folder


def test_one_run_does_not_choose_where_the_next_one_is_tracked(tmp_path: Path) -> None:
    for name in ("one", "two"):
        storage = Storage(str(tmp_path / name))
        (tmp_path / name).mkdir()
        assert Tracker(configured(tmp_path / name), storage).uri == f"sqlite:///{tmp_path / name}/mlflow.db"
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_a_stage_says_what_it_read_and_wrote(finished: tuple[Tracker, int]) -> None:
    tracker, _ = finished
    run = stage_run(tracker, "train")
    used = {
        (tag.value, entry.dataset.name): entry.dataset
        for entry in run.inputs.dataset_inputs
        for tag in entry.tags
        if tag.key == "mlflow.data.context"
    }
    assert set(used) == {
        ("input", "questions"), ("input", "model"), ("output", "train"), ("output", "model"),
    }  # fmt: skip
    assert "/data/tracked-" in used["input", "questions"].source
    assert all(0 < len(dataset.digest) <= 36 for dataset in used.values())
    read = stage_run(tracker, "data").inputs.dataset_inputs
    assert ("questions", used["input", "questions"].digest) in {(e.dataset.name, e.dataset.digest) for e in read}


def test_a_student_asked_by_its_alias_is_tracked(storage: Storage) -> None:
    """MLflow takes no "@" in a tag's name."""
    tracker, _ = registered(storage)
    trained = next(found for found in storage.children("train"))
    student = load(storage, f"train/{trained}")
    later = Tracker(configured(storage.uri("")), storage, "later", "evaluate")
    staged(later, storage, "evaluate", {f"models:/{NAME}@candidate": student}, b"asked by name")
    tags = MlflowClient(tracker.uri).get_run(later.run_id).data.tags
    assert tags[f"earlier.models:/{NAME}-candidate.fingerprint"] == student.fingerprint


def test_tags_name_everything_behind_a_stage(finished: tuple[Tracker, int]) -> None:
    tracker, _ = finished
    tags = stage_run(tracker, "register").data.tags
    assert {key for key in tags if key.startswith("upstream.")} == {
        "upstream.source", "upstream.data", "upstream.train", "upstream.evaluate",
    }  # fmt: skip
    assert tags["upstream.data"] == stage_run(tracker, "data").data.tags["masters.fingerprint"]
    assert tags["masters.mask_schedule"] == "0.2 0.15 0.1 0.05 0"
    assert tags["masters.judge_prompts"] == "1"
    assert tags["masters.code"] and tags["masters.stage_version"] == "1"


def test_the_version_leads_to_its_training_run_and_to_every_stage(finished: tuple[Tracker, int]) -> None:
    tracker, number = finished
    client = MlflowClient(tracker.uri)
    version = client.get_model_version(NAME, str(number))
    assert version.run_id == stage_run(tracker, "train").info.run_id
    for stage in ("data", "train", "evaluate", "register"):
        run_id = stage_run(tracker, stage).info.run_id
        assert version.tags[f"stage.{stage}.run_id"] == run_id
        assert f"- [{stage}](#/experiments/{tracker._experiment}/runs/{run_id})" in (version.description or "")
    assert tracker.registry.candidate(NAME) == number and tracker.registry.champion(NAME) is None
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["model_card.md"]


def test_scores_are_bound_to_the_model_and_the_questions(finished: tuple[Tracker, int]) -> None:
    tracker, _ = finished
    run = stage_run(tracker, "evaluate")
    assert run.data.metrics["accuracy_student-after"] == 0.5 and run.data.metrics["accuracy_t"] == 1.0
    client = MlflowClient(tracker.uri)
    (model,) = client.search_logged_models([run.info.experiment_id])
    bound = [metric for metric in model.metrics or [] if metric.run_id == run.info.run_id]
    assert [(metric.key, metric.dataset_name) for metric in bound] == [("accuracy_student-after", "questions")]


def test_a_run_cut_short_is_opened_again(storage: Storage) -> None:
    """Nothing of it ended: no stage, no registration."""
    first = Tracker(configured(Path(storage.uri(""))), storage, "flow-1")
    child = first.stage(Identity("data", 1, {}, {"content": digest(b"rows")}, NAME), {})
    child.__enter__()  # and killed here
    again, number = registered(storage, key="flow-1")
    assert again.run_id == first.run_id and number == 1
    client = MlflowClient(again.uri)
    runs = client.search_runs([again._experiment])
    assert len(runs) == 5 and {run.info.status for run in runs} == {"FINISHED"}


def test_a_registration_cut_short_is_finished(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", lambda *_: 1 / 0)
        with pytest.raises(TrackingError, match="MLflow: division by zero"):
            registered(storage)
    tracker, number = registered(storage)
    assert number == 1 and tracker.registry.candidate(NAME) == 1
    assert len(tracker.registry.versions(NAME)) == 1


def test_runs_whose_process_is_gone_are_ended(storage: Storage) -> None:
    lost = Tracker(configured(Path(storage.uri(""))), storage)
    under_way = lost.stage(Identity("data", 1, {}, {}, NAME), {})
    under_way.__enter__()
    client = MlflowClient(lost.uri)
    host, boot, pid, _ = machine.this_process().split()
    client.set_tag(lost.run_id, "masters.process", f"{host} {boot} {pid} 1")
    elsewhere = Tracker(configured(Path(storage.uri(""))), storage)
    client.set_tag(elsewhere.run_id, "masters.process", f"another {boot} {pid} 1")
    Tracker(configured(Path(storage.uri(""))), storage)
    assert client.get_run(lost.run_id).info.status == "KILLED"
    assert {run.info.status for run in tracking_children(lost)} == {"KILLED"}
    assert client.get_run(elsewhere.run_id).info.status == "RUNNING"
    assert len(tracking.live(lost.uri, storage)) == 2


def tracking_children(tracker: Tracker) -> list[Run]:
    return tracker.registry.stages(tracker._experiment, tracker.run_id)


def test_this_machine_remembers_where_a_name_is_tracked(storage: Storage, home: Path) -> None:
    tracker, _ = registered(storage)
    machine.remember(NAME, "http://elsewhere")
    assert machine.remembered(NAME) == ["http://elsewhere", tracker.uri]
    assert (home / ".cache/masters/tracking.json").stat().st_mode & 0o077 == 0
