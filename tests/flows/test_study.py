"""A study from the command line: two arms, two learning rates, fresh seeds, and runs that fail or are lost."""

import json
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
from mlflow import MlflowClient

from tests.command_line import ROOT, masters, read_json
from tests.shape_data import write_questions

CONFIG = """
name = "tiny"
[store]
root = "{root}"
[data]
source = "{source}"
[student]
model = "{models}/student"
[[teachers]]
model = "{models}/teacher"
r_max = 0.0
[generate]
max_tokens = 8
dtype = "float32"
[train]
questions_per_step = 8
[runtime]
max_model_len = 512
"""
STUDY = """
name = "shapes"
config = "tiny.toml"
results = "results"
learning_rates = [1e-6, 1e-3]
seeds = [1, 2]
validation.share = 0.25
[base]
train.targets = "labels"
[arms.distillation]
train.objective = "kd"
[arms.fine-tuning]
learning_rates = [1e-4]
train.objective = "sft"
[[comparisons]]
better = "distillation"
than = "fine-tuning"
"""
RUNS = {
    "tuning-distillation-1e-06-0",
    "tuning-distillation-0.001-0",
    "final-distillation-{}-1",
    "final-distillation-{}-2",
    "final-fine-tuning-0.0001-1",
    "final-fine-tuning-0.0001-2",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    source = write_questions(folder / "data", 48, bad=False)
    values = dict(root=folder / "store", source=source, models=ROOT / "demo/models")
    (folder / "tiny.toml").write_text(CONFIG.format(**values))
    (folder / "study.toml").write_text(STUDY)
    (folder / "home").mkdir()
    return folder


def studied(place: Path, prefect: dict[str, str]) -> dict:
    return read_json(masters("study", str(place / "study.toml"), "--json", home=place / "home", **prefect))


@pytest.fixture(scope="module")
def first(place: Path, prefect: dict[str, str]) -> dict:
    return studied(place, prefect)


def results(place: Path) -> dict[str, dict]:
    return {file.stem: json.loads(file.read_text()) for file in (place / "results").glob("*-*-*.json")}


@pytest.mark.slow
def test_the_rate_is_chosen_on_validation_and_the_arms_compared_on_the_test_split(first: dict, place: Path) -> None:
    arms = {row["arm"]: row for row in first["arms"]}
    rate = arms["distillation"]["learning_rate"]
    assert set(results(place)) == {name.format(rate) for name in RUNS}
    rates = {row["learning_rate"]: row["accuracy"] for row in arms["distillation"]["validation"]}
    assert rates[rate] == max(rates.values()) and arms["distillation"]["at_edge"]
    assert arms["fine-tuning"]["validation"] == [] and not arms["fine-tuning"]["at_edge"]
    question_sets = {(run["phase"], run["questions"]) for run in results(place).values()}
    assert len(question_sets) == 2 and {run["count"] for run in results(place).values() if run["phase"] == "final"} == {
        12
    }
    [comparison] = first["comparisons"]
    gap = arms["distillation"]["accuracy"] - arms["fine-tuning"]["accuracy"]
    assert comparison["difference"] == pytest.approx(gap) and comparison["questions"] == 12
    assert len({run["steps"] for run in results(place).values()}) == 1


@pytest.mark.slow
def test_the_report_is_written_and_runs_are_nested_in_mlflow(first: dict, place: Path) -> None:
    report = place / "results/report"
    assert {file.name for file in report.iterdir()} == {
        "table.md",
        "report.json",
        "runs.parquet",
        "accuracy.png",
        "learning-rates.png",
    }
    assert (report / "table.md").read_text() == first["markdown"]
    table = parquet.read_table(report / "runs.parquet").to_pylist()
    assert sorted((row["phase"], row["accuracy"]) for row in table) == sorted(
        (run["phase"], run["accuracy"]) for run in results(place).values()
    )
    client = MlflowClient(f"sqlite:///{place}/store/mlflow.db")
    [experiment] = [e for e in client.search_experiments() if e.name == "tiny"]
    below = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{first['mlflow']['run_id']}'")
    assert {run.info.run_name for run in below} == set(results(place))
    assert {run.info.run_id for run in below} == {run["mlflow_run_id"] for run in results(place).values()}
    listed = {file.path for file in client.list_artifacts(first["mlflow"]["run_id"], "report")}
    assert "report/runs.parquet" in listed


@pytest.mark.slow
def test_only_a_lost_result_is_computed_again_and_is_equal(first: dict, place: Path, prefect: dict[str, str]) -> None:
    before = results(place)
    lost = place / "results/final-fine-tuning-0.0001-2.json"
    lost.unlink()
    assert studied(place, prefect)["arms"] == first["arms"]
    after = results(place)
    made = {name for name in after if after[name]["mlflow_run_id"] != before[name]["mlflow_run_id"]}
    assert made == {lost.stem}


@pytest.mark.slow
def test_results_of_other_settings_are_refused(first: dict, place: Path, prefect: dict[str, str]) -> None:
    text = (place / "study.toml").read_text()
    (place / "other.toml").write_text(text.replace('"kd"', '"kd"\ntrain.divergence = "jsd"'))
    done = masters("study", str(place / "other.toml"), home=place / "home", **prefect)
    assert done.returncode == 2 and "is the result of other settings" in done.stderr


@pytest.mark.slow
def test_a_failed_run_is_reported_and_the_others_still_run(first: dict, place: Path, prefect: dict[str, str]) -> None:
    """Engines and trainers cannot start, so every run that is not in the store fails."""
    text = STUDY.replace('"results"', '"failing"').replace("seeds = [1, 2]", "seeds = [1, 3]")
    (place / "failing.toml").write_text(text)
    broken = prefect | {"MASTERS_PYTHON": "/bin/false"}
    done = masters("study", str(place / "failing.toml"), "--json", home=place / "home", **broken)
    report, rate = json.loads(done.stdout.splitlines()[-1]), first["arms"][0]["learning_rate"]
    assert done.returncode == 1 and "2 runs failed, 4 finished" in done.stderr
    lost = {f"final-distillation-{rate}-3", "final-fine-tuning-0.0001-3"}
    assert {run["run"] for run in report["failed"]} == lost
    assert {file.stem for file in (place / "failing").glob("*-*-*.json")} == {
        name for name in results(place) if not name.endswith("-2")
    }
    assert [row["seeds"] for row in report["arms"]] == [1, 1]
    assert "expected 2 seeds" in report["comparisons"][0]["error"]
