"""The address of MLflow, and the runs, lineage and versions that a distillation writes. MLflow on SQLite."""

import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partialmethod
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from mlflow.utils.validation import _validate_metric_name, _validate_tag_name

from masters.common import machine
from masters.common.errors import InputError, TrackingError
from masters.common.hashing import digest
from masters.flows.nightly import run_night
from masters.store.artifacts import External, Identity, load
from masters.store.storage import Storage
from masters.tracking import metric_buffer, open_runs, run_lineage
from masters.tracking.locations import check_tracking_uri
from masters.tracking.run_writer import RunWriter
from tests.tracked_run import NAME, make_config, write_run, write_stage

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunWriter, int]:
    """A finished run that tests only read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        return write_run(Storage(str(tmp_path_factory.mktemp("finished"))))


def stage_run(writer: RunWriter, stage: str) -> Run:
    client = MlflowClient(writer.uri)
    return client.get_run(client.get_run(writer.run_id).data.tags[f"stage.{stage}.run_id"])


def test_an_unreachable_server_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9 does not answer.*runtime\.mlflow_uri"):
        RunWriter(make_config(tmp_path, mlflow_uri="http://127.0.0.1:9"), Storage(str(tmp_path)))


@pytest.mark.parametrize(
    ("reason", "attempts"),
    [
        ('(psycopg2.errors.UniqueViolation) duplicate key value violates unique constraint "dataset_pk"', 2),
        ("(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.experiment_id", 2),
        ("no space left", 1),
    ],
)
def test_a_data_set_that_another_run_stores_at_the_same_moment_is_linked_again(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, reason: str, attempts: int
) -> None:
    calls, log_inputs = [], MlflowClient.log_inputs

    def fail_once(client: MlflowClient, *arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise MlflowException(reason, BAD_REQUEST)
        log_inputs(client, *arguments)

    monkeypatch.setattr(MlflowClient, "log_inputs", fail_once)
    writer = RunWriter(make_config(storage.uri("")), storage)
    datasets = run_lineage.input_datasets({"source": External("source", "/q.jsonl", "5" * 64)})
    with nullcontext() if attempts > 1 else pytest.raises(TrackingError, match=reason):
        writer._log_inputs(writer.run_id, datasets)
    assert len(calls) == attempts
    assert len(MlflowClient(writer.uri).get_run(writer.run_id).inputs.dataset_inputs) == attempts - 1


@pytest.mark.parametrize("name", ["create_run", "log_inputs"])
def test_an_interrupt_while_the_run_of_a_stage_is_opened_leaves_no_running_run(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    writer = RunWriter(make_config(storage.uri("")), storage)
    request = getattr(MlflowClient, name)

    def interrupt(*arguments: object, **options: object) -> None:
        request(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MlflowClient, name, interrupt)
        with writer.stage(Identity("mask", 1, {}, {}), {}):
            pass
    writer.finish("FAILED")
    client = MlflowClient(writer.uri)
    (stage,) = client.search_runs([client.get_run(writer.run_id).info.experiment_id], "tags.`masters.stage` = 'mask'")
    assert stage.info.status == "KILLED"


def test_a_night_refuses_an_unreachable_server(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9 does not answer"):
        run_night(make_config(tmp_path, mlflow_uri="http://127.0.0.1:9"))
    assert time.monotonic() - began < 120  # shorter than seven retries of MLflow's client


def test_a_password_in_the_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI") as caught:
        RunWriter(make_config(tmp_path, mlflow_uri="http://me:hunter2@127.0.0.1:9"), Storage(str(tmp_path)))
    assert "hunter2" not in str(caught.value)


def test_the_default_database_lies_beside_the_artifacts(storage: Storage, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert write_run(storage)[1] == 1
    assert write_run(storage)[1] == 1  # the same student is registered once
    assert write_run(storage, b"other")[1] == 2
    assert (tmp_path / "store/mlflow.db").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"store", "home"}  # nothing in the working folder


def test_a_run_does_not_change_the_address_of_the_next(tmp_path: Path) -> None:
    for name in ("one", "two"):
        storage = Storage(str(tmp_path / name))
        (tmp_path / name).mkdir()
        assert RunWriter(make_config(tmp_path / name), storage).uri == f"sqlite:///{tmp_path / name}/mlflow.db"
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_a_stage_logs_its_inputs_and_outputs(finished: tuple[RunWriter, int]) -> None:
    writer, _ = finished
    run = stage_run(writer, "train")
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
    read = stage_run(writer, "data").inputs.dataset_inputs
    assert ("questions", used["input", "questions"].digest) in {(e.dataset.name, e.dataset.digest) for e in read}


def test_a_student_named_by_its_alias_is_tracked(storage: Storage) -> None:
    """MLflow takes no "@" in a tag's name."""
    writer, _ = write_run(storage)
    trained = next(found for found in storage.children("train"))
    student = load(storage, f"train/{trained}")
    later = RunWriter(make_config(storage.uri("")), storage, "later", "evaluate")
    write_stage(later, storage, "evaluate", {f"models:/{NAME}@candidate": student}, b"asked by name")
    tags = MlflowClient(writer.uri).get_run(later.run_id).data.tags
    assert tags[f"earlier.models:/{NAME}-candidate.fingerprint"] == student.fingerprint


UNUSUAL_NAMES = [
    "final(1)",
    "a+b=c",
    "models:/tracked@candidate",
    "/srv/models/x.y",
    "../up",
    "a//b/",
    ".",
    "x" * 400,
    "ü",
]


@pytest.mark.parametrize("name", UNUSUAL_NAMES)
def test_models_with_unusual_names_are_tracked(name: str, storage: Storage) -> None:
    """A run that is opened again writes its tags again."""
    write_run(storage)
    student = load(storage, f"train/{storage.children('train')[0]}")
    for _ in range(2):
        writer = RunWriter(make_config(storage.uri("")), storage, "one", "evaluate")
        write_stage(writer, storage, "evaluate", {name: student, f"model {name}": student}, b"asked")
        writer.log_metrics({f"accuracy_{name}": 0.5}, 0)
        writer.finish("FINISHED")
    run = MlflowClient(writer.uri).get_run(writer.run_id)
    assert run.info.status == "FINISHED" and 0.5 in run.data.metrics.values()


@given(st.text(max_size=300))
def test_any_text_becomes_a_valid_key(text: str) -> None:
    key = run_lineage.mlflow_key(f"accuracy_{text}")
    _validate_metric_name(key)
    _validate_tag_name(key)
    assert len(key) <= run_lineage.MAX_KEY_LENGTH


def test_a_role_with_a_dot_is_linked_from_the_version(storage: Storage) -> None:
    write_run(storage)
    student = load(storage, f"train/{storage.children('train')[0]}")
    writer = RunWriter(make_config(storage.uri("")), storage, "later")
    data = write_stage(writer, storage, "data", {"source": External("source", "/q.jsonl", "5" * 64)})
    trained = write_stage(writer, storage, "train", {"data": data, "model v1.5 x": student}, b"more")
    evaluated = write_stage(writer, storage, "evaluate", {"data": data, "student": trained}, b"more")
    exported = write_stage(writer, storage, "register", {"train": trained, "evaluate": evaluated}, b"more")
    number = writer.register_model(NAME, exported, trained, evaluated)
    found = MlflowClient(writer.uri).get_model_version(NAME, str(number))
    assert "- [model v1.5 x](" in (found.description or "")
    assert found.tags["upstream.train"] == trained.fingerprint


def test_links_use_the_address_for_browsers(finished: tuple[RunWriter, int], monkeypatch: pytest.MonkeyPatch) -> None:
    writer, _ = finished
    assert writer.run_url("1") is None
    monkeypatch.setenv("MASTERS_MLFLOW_PUBLIC_URL", "https://mlflow.example/")
    assert (writer.run_url("1") or "").startswith("https://mlflow.example/#/experiments/")
    assert (writer.model_url("m", 2) or "") == "https://mlflow.example/#/models/m/versions/2"


def test_tags_name_everything_upstream(finished: tuple[RunWriter, int]) -> None:
    writer, _ = finished
    tags = stage_run(writer, "register").data.tags
    assert {key for key in tags if key.startswith("upstream.")} == {
        "upstream.source", "upstream.data", "upstream.train", "upstream.evaluate",
    }  # fmt: skip
    assert tags["upstream.data"] == stage_run(writer, "data").data.tags["masters.fingerprint"]
    assert tags["masters.mask_schedule"] == "0.2 0.15 0.1 0.05 0"
    assert tags["masters.judge_prompts"] == "1"
    assert tags["masters.code"] and tags["masters.stage_version"] == "1"


def test_a_version_links_to_its_training_run_and_to_every_stage(finished: tuple[RunWriter, int]) -> None:
    writer, number = finished
    client = MlflowClient(writer.uri)
    version = client.get_model_version(NAME, str(number))
    assert version.run_id == stage_run(writer, "train").info.run_id
    for stage in ("data", "train", "evaluate", "register"):
        run_id = stage_run(writer, stage).info.run_id
        assert version.tags[f"stage.{stage}.run_id"] == run_id
        assert f"- [{stage}](#/experiments/{writer._experiment}/runs/{run_id})" in (version.description or "")
    assert writer.registry.candidate(NAME) == number and writer.registry.champion(NAME) is None
    assert [file.path for file in client.list_artifacts(writer.run_id)] == ["model_card.md"]


def test_scores_refer_to_the_model_and_the_questions(finished: tuple[RunWriter, int]) -> None:
    writer, _ = finished
    run = stage_run(writer, "evaluate")
    assert run.data.metrics["accuracy_student-after"] == 0.5 and run.data.metrics["accuracy_t"] == 1.0
    client = MlflowClient(writer.uri)
    (model,) = client.search_logged_models([run.info.experiment_id])
    metrics = [metric for metric in model.metrics or [] if metric.run_id == run.info.run_id]
    assert [(metric.key, metric.dataset_name) for metric in metrics] == [("accuracy_student-after", "questions")]


def test_an_interrupted_run_is_continued(storage: Storage) -> None:
    """Neither its stage nor its registration ended."""
    first = RunWriter(make_config(Path(storage.uri(""))), storage, "flow-1")
    child = first.stage(Identity("data", 1, {}, {"content": digest(b"rows")}, NAME), {})
    child.__enter__()  # interrupted here
    again, number = write_run(storage, key="flow-1")
    assert again.run_id == first.run_id and number == 1
    client = MlflowClient(again.uri)
    runs = client.search_runs([again._experiment])
    assert len(runs) == 5 and {run.info.status for run in runs} == {"FINISHED"}


def test_an_interrupted_registration_is_finished(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", lambda *_: 1 / 0)
        with pytest.raises(TrackingError, match="MLflow: division by zero"):
            write_run(storage)
    writer, number = write_run(storage)
    assert number == 1 and writer.registry.candidate(NAME) == 1
    assert len(writer.registry.versions(NAME)) == 1


@pytest.fixture
def unreachable() -> Iterator[pytest.MonkeyPatch]:
    """Let MLflow refuse metrics until the patch is undone."""
    real = MlflowClient.log_batch

    def refuse(self: MlflowClient, run_id: str, metrics=(), params=(), tags=(), **named):
        if metrics:
            raise ConnectionError("unreachable")
        return real(self, run_id, metrics, params, tags, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", refuse)
        yield patch


def test_metrics_are_written_once_mlflow_answers_again(storage: Storage, unreachable: pytest.MonkeyPatch) -> None:
    writer, steps = RunWriter(make_config(Path(storage.uri(""))), storage), 2 * metric_buffer.BATCH_SIZE + 1
    for step in range(steps):
        writer.log_metrics({"loss": float(step)}, step)
    client = MlflowClient(writer.uri)
    assert not client.get_metric_history(writer.run_id, "loss")
    unreachable.undo()
    assert writer.finish("FINISHED") is None and writer.lost_metrics == 0
    history = MlflowClient(writer.uri).get_metric_history(writer.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(step, float(step)) for step in range(steps)]


def test_lost_metrics_are_counted(storage: Storage, unreachable: pytest.MonkeyPatch) -> None:
    writer = RunWriter(make_config(Path(storage.uri(""))), storage)
    unreachable.setattr(metric_buffer, "MAX_PENDING", 10)
    for step in range(25):
        writer.log_metrics({"loss": 1.0}, step)
    writer._metrics.flush()
    assert writer.lost_metrics == 15  # of 25, 10 are kept
    assert writer.finish("FINISHED") == "25 metrics could not be written to MLflow"
    assert writer.lost_metrics == 25 and MlflowClient(writer.uri).get_run(writer.run_id).info.status == "FINISHED"


def test_runs_whose_process_is_gone_are_ended(storage: Storage) -> None:
    lost = RunWriter(make_config(Path(storage.uri(""))), storage)
    interrupted = lost.stage(Identity("data", 1, {}, {}, NAME), {})
    interrupted.__enter__()
    client = MlflowClient(lost.uri)
    host, boot, pid, *_ = machine.this_process().split()
    client.set_tag(lost.run_id, "masters.process", f"{host} {boot} {pid} 1")
    elsewhere = RunWriter(make_config(Path(storage.uri(""))), storage)
    client.set_tag(elsewhere.run_id, "masters.process", f"another {boot} {pid} 1")
    RunWriter(make_config(Path(storage.uri(""))), storage)
    assert client.get_run(lost.run_id).info.status == "KILLED"
    assert {run.info.status for run in stage_runs(lost)} == {"KILLED"}
    assert client.get_run(elsewhere.run_id).info.status == "RUNNING"
    assert len(open_runs.find_open_runs(lost.uri, storage)) == 2


def test_a_run_that_finishes_while_lost_runs_are_looked_for_stays_finished(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found as running, and its process ends right after it has written its status."""
    writer = RunWriter(make_config(Path(storage.uri(""))), storage)

    def finish_and_end(process: str) -> bool:
        writer.finish("FINISHED")
        return True

    monkeypatch.setattr(machine, "has_ended", finish_and_end)
    open_runs.end_lost_runs(writer.uri, storage)
    assert MlflowClient(writer.uri).get_run(writer.run_id).info.status == "FINISHED"


def test_a_run_of_another_machine_is_ended_by_its_key(storage: Storage) -> None:
    lost = RunWriter(make_config(Path(storage.uri(""))), storage, "flow-run-1", "evaluate")
    other = RunWriter(make_config(Path(storage.uri(""))), storage, "flow-run-2")
    client = MlflowClient(lost.uri)
    for run in (lost, other):
        client.set_tag(run.run_id, "masters.process", "pod-7 boot 1 1")
    open_runs.end_runs_with_key(lost.uri, storage, "flow-run-1")
    assert client.get_run(lost.run_id).info.status == "KILLED"
    assert client.get_run(other.run_id).info.status == "RUNNING"


def test_a_run_is_ended_with_all_runs_below_it(storage: Storage) -> None:
    study = RunWriter(make_config(Path(storage.uri(""))), storage, "flow-run-1", "study")
    cell = RunWriter(make_config(Path(storage.uri(""))), storage, "cell-1")
    cell.nest_under(study.run_id, "cell", {})
    client = MlflowClient(study.uri)
    experiment = client.get_run(cell.run_id).info.experiment_id
    stage = client.create_run(experiment, tags={"mlflow.parentRunId": cell.run_id})
    open_runs.end_runs_with_key(study.uri, storage, "flow-run-1")
    runs = [client.get_run(run) for run in (study.run_id, cell.run_id, stage.info.run_id)]
    assert [run.info.status for run in runs] == ["KILLED"] * 3


def test_open_runs_are_found_on_every_page_of_experiments(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RunWriter(make_config(Path(storage.uri(""))), storage)
    client = MlflowClient(writer.uri)
    for number in range(4):
        client.create_experiment(f"later-{number}")
    search = MlflowClient.search_experiments
    monkeypatch.setattr(MlflowClient, "search_experiments", partialmethod(search, max_results=2))
    assert [run.info.run_id for run in open_runs.find_open_runs(writer.uri, storage)] == [writer.run_id]


def test_a_store_has_one_address_whichever_path_leads_to_it(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(storage.uri(""))
    for path in (tmp_path / "link", tmp_path / "store" / ".." / "store"):
        assert Storage(str(path)).uri("") == storage.uri("")


def stage_runs(writer: RunWriter) -> list[Run]:
    return writer.registry.stage_runs(writer._experiment, writer.run_id)


@pytest.mark.parametrize("name", ["a?b", "a%20b"])
def test_a_store_whose_path_is_not_valid_in_an_address_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="its address cannot contain"):
        check_tracking_uri(make_config(tmp_path / name), Storage(str(tmp_path / name)))
