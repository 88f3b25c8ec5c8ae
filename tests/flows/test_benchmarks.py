"""A model on a task of the real lmms-eval gives the same rows as our own evaluation."""

import json
from dataclasses import replace
from pathlib import Path

import mlflow
import pyarrow.parquet as parquet
import pytest

from demo import benchmark
from masters.checks.model_folder import LocalModel, find_model
from masters.checks.preflight import preflight
from masters.common.errors import InputError
from masters.config import Config, Model
from masters.config.loading import load
from masters.evaluation.benchmark_index import PACKAGES
from masters.evaluation.benchmark_selection import PAPER, select_benchmarks
from masters.execution import processes
from masters.store import artifacts
from masters.tasks.benchmark import lmms_eval_process, make_identity
from masters.tasks.run_context import Context
from tests.command_line import ROOT, masters, read_json, rows

STUDENT = "demo/models/student"
DOCUMENTS = 20
installed = pytest.mark.skipif(
    not (PACKAGES / "lmms_eval").is_dir(), reason="lmms-eval is not installed: make setup-benchmarks"
)


def settings(place: Path) -> Config:
    return load(ROOT / "configs/easyvqa.toml", overridden(place))


def overridden(place: Path) -> list[str]:
    return [f"data.source={place / 'tasks/data'}", f"store.root={place / 'store'}"]


def student() -> LocalModel:
    return replace(find_model(Model(model=str(ROOT / STUDENT))), name=STUDENT)


@pytest.mark.slow
@installed
def test_lmms_eval_and_our_evaluation_agree_on_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect: dict[str, str]
) -> None:
    (tmp_path / "home").mkdir()
    benchmark.write(tmp_path / "tasks", DOCUMENTS)
    chosen = [part for setting in overridden(tmp_path) for part in ("--set", setting)]
    environment = prefect | {"MASTERS_BENCHMARK_TASKS": str(tmp_path / "tasks"), "HF_HUB_OFFLINE": "1"}
    words = ("evaluate", "configs/easyvqa.toml", STUDENT, *chosen, "--benchmark", benchmark.TASK, "--json")
    first = read_json(masters(*words, home=tmp_path / "home", **environment))
    stages = {stage["name"]: stage for stage in first["stages"]}
    assert [stage["outcome"] for stage in first["stages"]] == ["built"] * 3

    own_answers = {row["question_id"]: (row["text"], row["correct"]) for row in rows(first, "evaluate", "predictions")}
    documents = parquet.read_table(tmp_path / "tasks/data/test.parquet").to_pylist()
    samples = rows(first, "benchmarks", "samples")
    lmms_answers = {
        documents[row["doc_id"]]["id"]: (row["response"], json.loads(row["scores"])["exact_match"] == 1)
        for row in samples
    }
    assert lmms_answers == own_answers and len(own_answers) == DOCUMENTS
    assert [(row["prompt"], row["target"]) for row in samples] == [(q["question"], q["answer"]) for q in documents]

    [score] = rows(first, "benchmarks", "scores")
    assert first["benchmarks"] == {STUDENT: [score]}
    right = sum(correct for _, correct in own_answers.values())
    assert 0 < right < DOCUMENTS  # or nothing could be told apart
    assert (score["value"], score["n"]) == (pytest.approx(first["scores"][STUDENT]["accuracy"]), DOCUMENTS)
    assert (score["version"], score["metric"], score["filter"]) == ("1.0", "exact_match", "none")

    client = mlflow.MlflowClient(first["mlflow"]["tracking_uri"])
    for run_id in (first["mlflow"]["run_id"], stages["benchmarks"]["mlflow_run_id"]):
        run = client.get_run(run_id).data
        assert run.metrics[f"{STUDENT}/{benchmark.TASK}/exact_match"] == score["value"]
        assert run.tags[f"benchmark.{benchmark.TASK}.version"] == "1.0"
        assert run.tags["benchmark.lmms-eval"] == "0.7.3"

    monkeypatch.setenv("MASTERS_BENCHMARK_TASKS", str(tmp_path / "tasks"))
    found = Context(settings(tmp_path), preflight(settings(tmp_path)))
    identity = make_identity(found, student(), select_benchmarks([benchmark.TASK]), None, "benchmarks")
    assert found.storage.uri(identity.folder) == stages["benchmarks"]["uri"]  # another process finds it again
    assert artifacts.find(found.storage, identity)


@pytest.mark.slow
@installed
def test_a_benchmark_without_its_data_is_refused_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes before an engine starts: the model does not exist."""
    benchmark.write(tmp_path / "tasks", 1)
    (tmp_path / "tasks/data/test.parquet").unlink()
    monkeypatch.setenv("MASTERS_BENCHMARK_TASKS", str(tmp_path / "tasks"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    no_engine = replace(student(), folder=tmp_path / "none")
    process = lmms_eval_process(settings(tmp_path), no_engine, select_benchmarks([benchmark.TASK]), None, tmp_path)
    with pytest.raises(InputError, match=rf"benchmark {benchmark.TASK} cannot be loaded \(FileNotFoundError.*HF_TOKEN"):
        processes.run([process], 1, lambda *_: None)


@pytest.mark.slow
@installed
def test_the_installed_lmms_eval_has_the_papers_13(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = [PAPER[name] for name in ("MathVista", "MMB", "MMB-CN", "MM-Vet")]
    with pytest.raises(InputError, match=f"scoring {', '.join(judged)} sends"):
        select_benchmarks(["paper"])
    monkeypatch.setenv("MASTERS_JUDGED_BENCHMARKS", ",".join(judged))
    selection = select_benchmarks(["paper"])
    assert (len(selection.tasks), selection.version) == (13, "0.7.3")
