"""Writes the report of a study to the folder `report` of its results: table, plots, and a Parquet file of all runs."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from masters.evaluation.study_results import ResultStore
from masters.evaluation.study_runs import StudyRuns, compare_arms, summarize_arm
from masters.reporting.study_plots import plot_study
from masters.reporting.study_table import render_study

RUNS = pa.schema([
    ("study", pa.string()), ("phase", pa.string()), ("arm", pa.string()), ("learning_rate", pa.float64()),
    ("seed", pa.int64()), ("split", pa.string()), ("steps", pa.int64()), ("count", pa.int64()),
    ("accuracy", pa.float64()), ("standard_error", pa.float64()), ("untrained", pa.float64()),
    ("settings", pa.string()), ("questions", pa.string()), ("correct", pa.string()), ("mlflow_run_id", pa.string()),
    ("error", pa.string()),
])  # fmt: skip


def write_report(found: StudyRuns, results: ResultStore) -> tuple[dict, Path]:
    """Write the report's files. Returns the report and the folder."""
    arms = [summarize_arm(found, arm) for arm in found.study.arms]
    questions = {run.questions: results.questions(run.questions) for run in found.results.values()}
    comparisons = compare_arms(found, questions)
    text = render_study(arms, comparisons, found.errors)
    report = dict(
        study=found.study.name,
        status="failed" if found.errors else "completed",
        runs=len(found.results),
        failed=[dict(run=cell.name, error=error) for cell, error in found.errors.items()],
        arms=arms,
        comparisons=comparisons,
        markdown=text,
    )
    folder = results.folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    parquet.write_table(runs_table(found), folder / "runs.parquet")
    for name, content in plot_study(found, arms).items():
        (folder / f"{name}.png").write_bytes(content)
    return report, folder


def runs_table(found: StudyRuns) -> pa.Table:
    """Return a table with a row for each run, finished or failed."""
    rows = [dict(split=cell.split) | run.model_dump() for cell, run in found.results.items()]
    for cell, error in found.errors.items():
        rows.append(
            dict(phase=cell.phase, arm=cell.arm, learning_rate=cell.learning_rate, seed=cell.seed, split=cell.split)
            | dict(error=error)
        )
    return pa.Table.from_pylist([dict(study=found.study.name) | row for row in rows], RUNS)
