"""What of a stage that is handed on can be said without a server: its references, its configuration, its pool."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from mlflow import MlflowClient
from prefect.states import Cancelled, Completed, Crashed, Failed
from pydantic import ValidationError

from masters.checks.model_folder import Server
from masters.checks.preflight import Ready
from masters.common import errors
from masters.common.errors import InputError, MastersError, WorkerError, WorkerLost
from masters.config import Config
from masters.config.allowlist import check_config
from masters.config.loading import load
from masters.execution import pool_request
from masters.execution.pool_request import StageRequest, outside, portable
from masters.infra.settings import Settings
from masters.store.artifacts import External, Identity
from masters.store.storage import Storage
from masters.tasks import work_pools
from masters.tasks.run_context import Context, Run
from masters.tracking.pool_stage import PoolStageWriter
from masters.tracking.run_writer import RunWriter
from tests.scoring_run import Quiet
from tests.tracked_run import NAME, configured, made

DEMO = Path(__file__).parents[2] / "configs/easyvqa.toml"
NAMED = ["runtime.pools.cpu=c", "runtime.pools.generate=g", "runtime.pools.train=t"]
KEY = "0" * 32
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def wanted(**fields: object) -> StageRequest:
    return StageRequest.model_validate(dict(key=KEY, run=KEY, began=BEGAN, tracked=KEY, stage="generate") | fields)


@pytest.mark.parametrize("folder", ["../../etc", "data/../../x-0123456789abcdef", "/data/x-0123456789abcdef", "data/x"])
def test_a_reference_cannot_leave_the_store(folder: str) -> None:
    for fields in (dict(inputs=dict(data=folder)), dict(known=folder), dict(earlier=[folder]), dict(key=folder)):
        with pytest.raises(ValidationError):
            wanted(**fields)
    assert wanted(inputs=dict(data="data/x-0123456789abcdef")).inputs


@pytest.mark.parametrize(
    ("stage", "kind", "number"),
    [("generate", "generate", 1), ("train-3", "train", 3), ("evaluate-champion", "evaluate", 1)],
)
def test_a_stages_name_says_its_round(stage: str, kind: str, number: int) -> None:
    assert (wanted(stage=stage).kind, wanted(stage=stage).round) == (kind, number)


def test_a_portable_configuration_means_the_same_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(DEMO.parents[1])
    config = load(DEMO, NAMED)
    sent = portable(config, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert all(Path(model.model).is_dir() for model in (sent.student, *sent.teachers))
    assert sent.data == config.data and sent.store.root == str(tmp_path)  # easyvqa is a name wherever it is read
    assert Config.model_validate_json(sent.model_dump_json()) == sent
    assert sent.runtime.pools.named == [] and sent.runtime.max_model_len == config.runtime.max_model_len
    semantic = dict(exclude={"store", "student", "teachers", "runtime"})
    assert sent.model_dump(**semantic) == config.model_dump(**semantic)
    check_config(sent)


@pytest.mark.parametrize(
    ("accuracy", "judge", "score"),
    [("rules", None, "c"), ("llm", None, "g"), ("llm", Server("http://j/v1", None), "c")],
)
def test_stages_go_where_their_hardware_is(accuracy: str, judge: Server | None, score: str, tmp_path: Path) -> None:
    config = load(DEMO, [*NAMED, f"rewards.accuracy={accuracy}"])
    ready = Ready(Storage(str(tmp_path)), None, None, [], (), judge)  # pyright: ignore
    run = Run(Context(config, ready), Quiet())  # pyright: ignore
    found = {kind: run.pool(kind) for kind in ("data", "mask", "generate", "score", "train", "evaluate", "register")}
    assert found == dict(data="c", mask="c", generate="g", score=score, train="t", evaluate="g", register="")


def test_another_store_is_told_at_once(tmp_path: Path) -> None:
    ours, theirs = Storage(str(tmp_path / "ours")), Storage(str(tmp_path / "theirs"))
    pool_request.ask(ours, KEY)
    pool_request.check_asked(ours, KEY)
    with pytest.raises(InputError, match="not the same place"):
        pool_request.check_asked(theirs, KEY)
    pool_request.forget(ours, KEY)
    assert ours.names("handed") == []


def test_a_store_that_no_worker_reaches_is_refused() -> None:
    config = load(DEMO, NAMED)
    with pytest.raises(InputError, match="store that workers reach"):
        work_pools.check(config, Storage("memory://shelf"))


def test_the_default_database_of_a_store_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match="an MLflow that workers reach"):
        work_pools.check(load(DEMO, NAMED), Storage("s3://bucket/prefix"))


@pytest.mark.parametrize(
    "kind", ["MastersError", "InputError", "ArtifactError", "StoreError", "WorkerError", "WorkerLost"]
)
def test_what_failed_there_is_raised_here_as_the_same(kind: str) -> None:
    with pytest.raises(MastersError, match="a line .generate on pool g.$") as raised:
        work_pools._judge(Failed(name=kind, message="a\nline"), "generate", "g")
    assert type(raised.value) is getattr(errors, kind)


def test_a_lost_process_is_another_try_and_a_bug_or_a_cancellation_is_none() -> None:
    work_pools._judge(Completed(), "train", "t")
    for state, expected in (
        (Crashed(message="no heartbeat"), WorkerLost), (Failed(message="KeyError: 'x'"), WorkerError),
        (Failed(name="masked"), WorkerError), (Cancelled(), MastersError),
    ):  # fmt: skip
        with pytest.raises(MastersError) as raised:
            work_pools._judge(state, "train", "t")
        assert type(raised.value) is expected


def test_pools_of_the_stack_are_named_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.from_environment().pools == ()
    monkeypatch.setenv("MASTERS_POOLS", "cpu, gpu-train,cpu,")
    assert Settings.from_environment().pools == ("cpu", "gpu-train")
    for wrong in ("a/b", "masters", "a b"):
        monkeypatch.setenv("MASTERS_POOLS", wrong)
        with pytest.raises(InputError, match="MASTERS_POOLS"):
            Settings.from_environment()


def test_an_assignment_travels_as_json() -> None:
    told = wanted(rebuild=["score"], student=dict(name="models:/n/1", folder="train/n-0123456789abcdef"))
    assert StageRequest.model_validate(json.loads(told.model_dump_json())) == told


def test_what_differs_between_machines_is_told_before_it_is_built(tmp_path: Path) -> None:
    ours = dict(
        data=made(Storage(str(tmp_path)), "data"),
        teacher=External("model", "/m/t", "a" * 64),
        judge=External("server", "http://j", None),
    )
    asked = wanted(outside=outside(ours))
    asked.check_reads(ours | dict(teacher=External("model", "/elsewhere/t", "a" * 64)))
    with pytest.raises(InputError, match="another teacher on"):
        asked.check_reads(ours | dict(teacher=External("model", "/m/t", "b" * 64)))
    with pytest.raises(InputError, match="another student on"):
        asked.check_reads(ours | dict(student=External("model", "/m/s", "a" * 64)))


def test_a_workers_metrics_go_to_the_stages_run_and_nothing_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "store").mkdir()
    config, storage = configured(tmp_path / "store"), Storage(str(tmp_path / "store"))
    tracker, made_of = RunWriter(config, storage), Identity("train", 1, {}, {}, NAME)
    with tracker.stage(made_of, {}):
        asked = wanted(stage="train", tracked=tracker.current, run=tracker.key)
        there = PoolStageWriter(config, storage, asked)
        with there.stage(made_of, {}) as tracked:
            there.metrics(dict(loss=0.5), 7)
        client = MlflowClient(tracker.uri)
        run = client.get_run(tracked(made(storage, "train"), {}))
        assert run.info.status == "RUNNING" and there.run_id == tracker.run_id and there.lost == 0
    (metric,) = client.get_metric_history(run.info.run_id, "loss")
    assert (metric.value, metric.step) == (0.5, 7)
    with pytest.raises(InputError, match="holds no run"):
        PoolStageWriter(config, storage, wanted(tracked="f" * 32))
