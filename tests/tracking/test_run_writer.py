"""Where a run is tracked, and what it says about a stage's inputs and outputs. MLflow on SQLite."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partialmethod
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.utils.validation import _validate_metric_name, _validate_tag_name

from masters.common import machine
from masters.common.errors import InputError, TrackingError
from masters.common.hashing import digest
from masters.flows.nightly import night
from masters.store.artifacts import External, Identity, load
from masters.store.storage import Storage
from masters.tracking import locations, open_runs, run_lineage, run_writer
from masters.tracking.locations import check_beside
from masters.tracking.run_writer import RunWriter
from tests.tracked_run import NAME, configured, registered, staged


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
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunWriter, int]:
    """A run that tests only look at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        return registered(Storage(str(tmp_path_factory.mktemp("finished"))))


def stage_run(tracker: RunWriter, stage: str) -> Run:
    client = MlflowClient(tracker.uri)
    return client.get_run(client.get_run(tracker.run_id).data.tags[f"stage.{stage}.run_id"])


def test_a_server_that_does_not_answer_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9 does not answer.*runtime\.mlflow_uri"):
        RunWriter(configured(tmp_path, mlflow_uri="http://127.0.0.1:9"), Storage(str(tmp_path)))


def test_so_is_it_by_a_night_which_asks_for_the_champion_first(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9 does not answer"):
        night(configured(tmp_path, mlflow_uri="http://127.0.0.1:9"))
    assert time.monotonic() - began < 120  # less than the pauses between seven retries of MLflow


def test_a_password_in_the_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI") as caught:
        RunWriter(configured(tmp_path, mlflow_uri="http://me:hunter2@127.0.0.1:9"), Storage(str(tmp_path)))
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
        assert RunWriter(configured(tmp_path / name), storage).uri == f"sqlite:///{tmp_path / name}/mlflow.db"
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_a_stage_says_what_it_read_and_wrote(finished: tuple[RunWriter, int]) -> None:
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
    later = RunWriter(configured(storage.uri("")), storage, "later", "evaluate")
    staged(later, storage, "evaluate", {f"models:/{NAME}@candidate": student}, b"asked by name")
    tags = MlflowClient(tracker.uri).get_run(later.run_id).data.tags
    assert tags[f"earlier.models:/{NAME}-candidate.fingerprint"] == student.fingerprint


HOSTILE = ["final(1)", "a+b=c", "models:/tracked@candidate", "/srv/models/x.y", "../up", "a//b/", ".", "x" * 400, "ü"]


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_a_model_is_called_it_is_tracked(name: str, storage: Storage) -> None:
    """Also by a run that is opened again, whose tags are written anew."""
    registered(storage)
    student = load(storage, f"train/{storage.children('train')[0]}")
    for _ in range(2):
        tracker = RunWriter(configured(storage.uri("")), storage, "one", "evaluate")
        staged(tracker, storage, "evaluate", {name: student, f"model {name}": student}, b"asked")
        tracker.metrics({f"accuracy_{name}": 0.5}, 0)
        tracker.finish("FINISHED")
    run = MlflowClient(tracker.uri).get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and 0.5 in run.data.metrics.values()


@given(st.text(max_size=300))
def test_any_text_becomes_a_key_that_mlflow_takes(text: str) -> None:
    made = run_lineage.key(f"accuracy_{text}")
    _validate_metric_name(made)
    _validate_tag_name(made)
    assert len(made) <= run_lineage.KEY_LENGTH


def test_a_role_with_a_dot_is_linked_from_the_version(storage: Storage) -> None:
    registered(storage)
    student = load(storage, f"train/{storage.children('train')[0]}")
    tracker = RunWriter(configured(storage.uri("")), storage, "later")
    data = staged(tracker, storage, "data", {"source": External("source", "/q.jsonl", "5" * 64)})
    trained = staged(tracker, storage, "train", {"data": data, "model v1.5 x": student}, b"more")
    evaluated = staged(tracker, storage, "evaluate", {"data": data, "student": trained}, b"more")
    exported = staged(tracker, storage, "register", {"train": trained, "evaluate": evaluated}, b"more")
    number = tracker.register_model(NAME, exported, trained, evaluated)
    found = MlflowClient(tracker.uri).get_model_version(NAME, str(number))
    assert "- [model v1.5 x](" in (found.description or "")
    assert found.tags["upstream.train"] == trained.fingerprint


def test_links_lead_to_where_a_browser_finds_mlflow(
    finished: tuple[RunWriter, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, _ = finished
    assert tracker.page("1") is None
    monkeypatch.setenv("MASTERS_MLFLOW_PUBLIC_URL", "https://mlflow.example/")
    assert (tracker.page("1") or "").startswith("https://mlflow.example/#/experiments/")
    assert (tracker.model_page("m", 2) or "") == "https://mlflow.example/#/models/m/versions/2"


def test_tags_name_everything_behind_a_stage(finished: tuple[RunWriter, int]) -> None:
    tracker, _ = finished
    tags = stage_run(tracker, "register").data.tags
    assert {key for key in tags if key.startswith("upstream.")} == {
        "upstream.source", "upstream.data", "upstream.train", "upstream.evaluate",
    }  # fmt: skip
    assert tags["upstream.data"] == stage_run(tracker, "data").data.tags["masters.fingerprint"]
    assert tags["masters.mask_schedule"] == "0.2 0.15 0.1 0.05 0"
    assert tags["masters.judge_prompts"] == "1"
    assert tags["masters.code"] and tags["masters.stage_version"] == "1"


def test_the_version_leads_to_its_training_run_and_to_every_stage(finished: tuple[RunWriter, int]) -> None:
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


def test_scores_are_bound_to_the_model_and_the_questions(finished: tuple[RunWriter, int]) -> None:
    tracker, _ = finished
    run = stage_run(tracker, "evaluate")
    assert run.data.metrics["accuracy_student-after"] == 0.5 and run.data.metrics["accuracy_t"] == 1.0
    client = MlflowClient(tracker.uri)
    (model,) = client.search_logged_models([run.info.experiment_id])
    bound = [metric for metric in model.metrics or [] if metric.run_id == run.info.run_id]
    assert [(metric.key, metric.dataset_name) for metric in bound] == [("accuracy_student-after", "questions")]


def test_a_run_cut_short_is_opened_again(storage: Storage) -> None:
    """Nothing of it ended: no stage, no registration."""
    first = RunWriter(configured(Path(storage.uri(""))), storage, "flow-1")
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


@pytest.fixture
def gone() -> Iterator[pytest.MonkeyPatch]:
    """MLflow takes no metrics until it is undone."""
    real = MlflowClient.log_batch

    def away(self: MlflowClient, run_id: str, metrics=(), params=(), tags=(), **named):
        if metrics:
            raise ConnectionError("away")
        return real(self, run_id, metrics, params, tags, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", away)
        yield patch


def test_metrics_are_told_later_where_mlflow_is_away(storage: Storage, gone: pytest.MonkeyPatch) -> None:
    tracker, steps = RunWriter(configured(Path(storage.uri(""))), storage), 2 * run_writer.METRICS_AT_ONCE + 1
    for step in range(steps):
        tracker.metrics({"loss": float(step)}, step)
    client = MlflowClient(tracker.uri)
    assert not client.get_metric_history(tracker.run_id, "loss")
    gone.undo()
    assert tracker.finish("FINISHED") is None and tracker.lost == 0
    history = MlflowClient(tracker.uri).get_metric_history(tracker.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(step, float(step)) for step in range(steps)]


def test_what_mlflow_never_got_is_counted(storage: Storage, gone: pytest.MonkeyPatch) -> None:
    tracker = RunWriter(configured(Path(storage.uri(""))), storage)
    gone.setattr(run_writer, "METRICS_KEPT", 10)
    for step in range(25):
        tracker.metrics({"loss": 1.0}, step)
    tracker.flush()
    assert tracker.lost == 15  # more than are kept
    assert tracker.finish("FINISHED") == "25 metrics could not be written to MLflow"
    assert tracker.lost == 25 and MlflowClient(tracker.uri).get_run(tracker.run_id).info.status == "FINISHED"


def test_runs_whose_process_is_gone_are_ended(storage: Storage) -> None:
    lost = RunWriter(configured(Path(storage.uri(""))), storage)
    under_way = lost.stage(Identity("data", 1, {}, {}, NAME), {})
    under_way.__enter__()
    client = MlflowClient(lost.uri)
    host, boot, pid, *_ = machine.this_process().split()
    client.set_tag(lost.run_id, "masters.process", f"{host} {boot} {pid} 1")
    elsewhere = RunWriter(configured(Path(storage.uri(""))), storage)
    client.set_tag(elsewhere.run_id, "masters.process", f"another {boot} {pid} 1")
    RunWriter(configured(Path(storage.uri(""))), storage)
    assert client.get_run(lost.run_id).info.status == "KILLED"
    assert {run.info.status for run in tracking_children(lost)} == {"KILLED"}
    assert client.get_run(elsewhere.run_id).info.status == "RUNNING"
    assert len(open_runs.live(lost.uri, storage)) == 2


def test_a_run_whose_process_was_on_another_machine_is_ended_by_its_key(storage: Storage) -> None:
    lost = RunWriter(configured(Path(storage.uri(""))), storage, "flow-run-1", "evaluate")
    other = RunWriter(configured(Path(storage.uri(""))), storage, "flow-run-2")
    client = MlflowClient(lost.uri)
    for run in (lost, other):
        client.set_tag(run.run_id, "masters.process", "pod-7 boot 1 1")
    open_runs.close_of(lost.uri, storage, "flow-run-1")
    assert client.get_run(lost.run_id).info.status == "KILLED"
    assert client.get_run(other.run_id).info.status == "RUNNING"


def test_what_lies_below_a_run_is_ended_with_it_at_any_depth(storage: Storage) -> None:
    study = RunWriter(configured(Path(storage.uri(""))), storage, "flow-run-1", "study")
    own = RunWriter(configured(Path(storage.uri(""))), storage, "cell-1")
    own.nest(study.run_id, "cell", {})
    client = MlflowClient(study.uri)
    experiment = client.get_run(own.run_id).info.experiment_id
    stage = client.create_run(experiment, tags={"mlflow.parentRunId": own.run_id})
    open_runs.close_of(study.uri, storage, "flow-run-1")
    runs = [client.get_run(run) for run in (study.run_id, own.run_id, stage.info.run_id)]
    assert [run.info.status for run in runs] == ["KILLED"] * 3


def test_a_live_run_is_found_behind_any_number_of_experiments(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = RunWriter(configured(Path(storage.uri(""))), storage)
    client = MlflowClient(tracker.uri)
    for number in range(4):
        client.create_experiment(f"later-{number}")
    search = MlflowClient.search_experiments
    monkeypatch.setattr(MlflowClient, "search_experiments", partialmethod(search, max_results=2))
    assert [run.info.run_id for run in open_runs.live(tracker.uri, storage)] == [tracker.run_id]


def test_a_store_has_one_name_by_whichever_way_it_is_reached(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(storage.uri(""))
    for way in (tmp_path / "link", tmp_path / "store" / ".." / "store"):
        assert Storage(str(way)).uri("") == storage.uri("")


def test_names_remembered_at_once_are_all_remembered(home: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: locations.remember(f"name-{n}", "sqlite:///x"), range(64)))
    assert all(locations.remembered(f"name-{n}") for n in range(64))


def tracking_children(tracker: RunWriter) -> list[Run]:
    return tracker.registry.stages(tracker._experiment, tracker.run_id)


def test_this_machine_remembers_where_a_name_is_tracked(storage: Storage, home: Path) -> None:
    tracker, _ = registered(storage)
    locations.remember(NAME, "http://elsewhere")
    assert locations.remembered(NAME) == ["http://elsewhere", tracker.uri]
    assert (home / ".cache/masters/tracking.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", ["a?b", "a%20b"])
def test_a_store_whose_path_no_address_of_a_database_can_hold_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="whose address cannot hold"):
        check_beside(Storage(str(tmp_path / name)))
