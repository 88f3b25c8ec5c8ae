"""Stages on work pools without a server: the request, the portable configuration, the choice of pool, and failures."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from mlflow import MlflowClient
from prefect.states import Cancelled, Completed, Crashed, Failed
from pydantic import ValidationError

from masters.checks.model_folder import JudgeServer
from masters.checks.preflight import Resources
from masters.common import errors
from masters.common.errors import InputError, MastersError, WorkerError, WorkerLost
from masters.config import Config
from masters.config.allowlist import check_config
from masters.config.loading import load
from masters.execution import pool_request
from masters.execution.pool_request import StageRequest, external_digests, make_portable
from masters.infra.settings import Settings
from masters.store.artifacts import External, Identity
from masters.store.storage import Storage
from masters.tasks import work_pools
from masters.tasks.run_context import Context, Run
from masters.tracking.pool_stage import PoolStageWriter
from masters.tracking.run_writer import RunWriter
from tests.command_line import masters
from tests.s3_server import BUCKET, S3
from tests.scoring_run import MemoryTracker
from tests.tracked_run import NAME, commit_artifact, make_config

DEMO = Path(__file__).parents[2] / "configs/easyvqa.toml"
NAMED = ["runtime.pools.cpu=c", "runtime.pools.generate=g", "runtime.pools.train=t"]
KEY = "0" * 32
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def make_request(**fields: object) -> StageRequest:
    return StageRequest.model_validate(dict(key=KEY, run=KEY, began=BEGAN, tracked=KEY, stage="generate") | fields)


@pytest.mark.parametrize("folder", ["../../etc", "data/../../x-0123456789abcdef", "/data/x-0123456789abcdef", "data/x"])
def test_a_reference_cannot_leave_the_store(folder: str) -> None:
    for fields in (dict(inputs=dict(data=folder)), dict(known=folder), dict(earlier=[folder]), dict(key=folder)):
        with pytest.raises(ValidationError):
            make_request(**fields)
    assert make_request(inputs=dict(data="data/x-0123456789abcdef")).inputs


@pytest.mark.parametrize(
    ("stage", "kind", "number"),
    [("generate", "generate", 1), ("train-3", "train", 3), ("evaluate-champion", "evaluate", 1)],
)
def test_stage_name_has_the_round(stage: str, kind: str, number: int) -> None:
    assert (make_request(stage=stage).kind, make_request(stage=stage).round) == (kind, number)


def test_portable_configuration_is_equal_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DEMO.parents[1])
    config = load(DEMO, NAMED)
    sent = make_portable(config, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert all(Path(model.model).is_dir() for model in (sent.student, *sent.teachers))
    assert sent.data == config.data and sent.store.root == str(tmp_path)  # easyvqa is a name wherever it is read
    assert Config.model_validate_json(sent.model_dump_json()) == sent
    assert sent.runtime.pools.names == [] and sent.runtime.max_model_len == config.runtime.max_model_len
    semantic = dict(exclude={"store", "student", "teachers", "runtime"})
    assert sent.model_dump(**semantic) == config.model_dump(**semantic)
    check_config(sent)


@pytest.mark.parametrize(
    ("accuracy", "judge", "score"),
    [("rules", None, "c"), ("llm", None, "g"), ("llm", JudgeServer("http://j/v1", None), "c")],
)
def test_stages_run_on_the_pool_of_their_hardware(
    accuracy: str, judge: JudgeServer | None, score: str, tmp_path: Path
) -> None:
    config = load(DEMO, [*NAMED, f"rewards.accuracy={accuracy}"])
    resources = Resources(Storage(str(tmp_path)), None, None, [], (), judge)  # pyright: ignore
    run = Run(Context(config, resources), MemoryTracker())  # pyright: ignore
    found = {
        kind: run.pool_for(kind) for kind in ("data", "mask", "generate", "score", "train", "evaluate", "register")
    }
    assert found == dict(data="c", mask="c", generate="g", score=score, train="t", evaluate="g", register="")


def test_another_store_is_refused(tmp_path: Path) -> None:
    run_store, other_store = Storage(str(tmp_path / "a")), Storage(str(tmp_path / "b"))
    pool_request.write_note(run_store, KEY)
    pool_request.check_note(run_store, KEY)
    with pytest.raises(InputError, match="not the same place"):
        pool_request.check_note(other_store, KEY)
    pool_request.remove_note_and_result(run_store, KEY)
    assert run_store.names("handed") == []


def test_store_that_workers_cannot_reach_is_refused() -> None:
    config = load(DEMO, NAMED)
    with pytest.raises(InputError, match="store that workers reach"):
        work_pools.check_pools(config, Storage("memory://shelf"))


def test_default_mlflow_database_of_a_remote_store_is_refused(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match="an MLflow server that workers reach"):
        work_pools.check_pools(load(DEMO, NAMED), Storage(f"s3://{BUCKET}/pools"))


@pytest.mark.parametrize(
    "kind", ["MastersError", "InputError", "ArtifactError", "StoreError", "WorkerError", "WorkerLost"]
)
def test_failure_on_the_pool_raises_the_same_error(kind: str) -> None:
    with pytest.raises(MastersError, match="a line .generate on pool g.$") as raised:
        work_pools._raise_failure(Failed(name=kind, message="a\nline"), "generate", "g")
    assert type(raised.value) is getattr(errors, kind)


def test_lost_process_is_retryable_and_bug_or_cancellation_is_not() -> None:
    work_pools._raise_failure(Completed(), "train", "t")
    errors_by_state = [
        (Crashed(message="no heartbeat"), WorkerLost),
        (Failed(message="KeyError: 'x'"), WorkerError),
        (Failed(name="masked"), WorkerError),
        (Cancelled(), MastersError),
    ]
    for state, expected in errors_by_state:
        with pytest.raises(MastersError) as raised:
            work_pools._raise_failure(state, "train", "t")
        assert type(raised.value) is expected


def test_settings_read_pools_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.from_environment().pools == ()
    monkeypatch.setenv("MASTERS_POOLS", "cpu, gpu-train,cpu,")
    assert Settings.from_environment().pools == ("cpu", "gpu-train")
    for wrong in ("a/b", "masters", "a b"):
        monkeypatch.setenv("MASTERS_POOLS", wrong)
        with pytest.raises(InputError, match="MASTERS_POOLS"):
            Settings.from_environment()


def test_stage_request_round_trips_through_json() -> None:
    request = make_request(rebuild=["score"], student=dict(name="models:/n/1", folder="train/n-0123456789abcdef"))
    assert StageRequest.model_validate(json.loads(request.model_dump_json())) == request


def test_inputs_that_differ_between_machines_are_refused(tmp_path: Path) -> None:
    upstream = dict(
        data=commit_artifact(Storage(str(tmp_path)), "data"),
        teacher=External("model", "/m/t", "a" * 64),
        judge=External("server", "http://j", None),
    )
    request = make_request(outside=external_digests(upstream))
    request.check_reads(upstream | dict(teacher=External("model", "/elsewhere/t", "a" * 64)))
    with pytest.raises(InputError, match="another teacher on"):
        request.check_reads(upstream | dict(teacher=External("model", "/m/t", "b" * 64)))
    with pytest.raises(InputError, match="another student on"):
        request.check_reads(upstream | dict(student=External("model", "/m/s", "a" * 64)))


def test_worker_writes_metrics_only_to_the_run_of_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "store").mkdir()
    config, storage = make_config(tmp_path / "store"), Storage(str(tmp_path / "store"))
    tracker, identity = RunWriter(config, storage), Identity("train", 1, {}, {}, NAME)
    with tracker.stage(identity, {}):
        request = make_request(stage="train", tracked=tracker.current_run_id, run=tracker.key)
        writer = PoolStageWriter(config, storage, request)
        with writer.stage(identity, {}) as tracked:
            writer.log_metrics(dict(loss=0.5), 7)
        client = MlflowClient(tracker.uri)
        run = client.get_run(tracked(commit_artifact(storage, "train"), {}))
        assert run.info.status == "RUNNING" and writer.run_id == tracker.run_id and writer.lost_metrics == 0
    (metric,) = client.get_metric_history(run.info.run_id, "loss")
    assert (metric.value, metric.step) == (0.5, 7)
    with pytest.raises(InputError, match="has no run f+"):
        PoolStageWriter(config, storage, make_request(tracked="f" * 32))


def test_check_refuses_pools_that_the_server_does_not_have(tmp_path: Path) -> None:
    overrides = [*NAMED, f"store.root={tmp_path / 'store'}", "data.train_limit=40"]
    sets = [part for value in overrides for part in ("--set", value)]
    done = masters("check", str(DEMO), *sets, home=tmp_path / "home")
    assert done.returncode == 2 and "expected the deployment stage/" in done.stderr and "ready" not in done.stdout
