"""report: show the results of a run as artifacts in Prefect's UI, and its plots in MLflow. Nothing depends on it."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from masters.common.redaction import redact
from masters.config.stages import Stage
from masters.reporting.gallery import render_gallery
from masters.reporting.markdown import embed_image, escape_text
from masters.reporting.plots import plot_training
from masters.store.artifacts import Artifact
from masters.tasks.judges import accuracy_metric
from masters.tasks.progress import artifact_key, warn
from masters.tasks.run_context import Run
from masters.tasks.training_signal import LIMITS, Shares, crossed_limits

CAPTIONS = {
    "training": "Loss, divergence, share of labels predicted token by token, and mask ratio over training",
    "diagnostics": "Log-probability of correct and wrong responses, entropy, and signs of a failing run",
    "rewards": "Rewards by source and mask ratio",
    "divergences": "Divergence by mask ratio",
}


def report_run(run: Run, version: int | None) -> None:
    """Report on a finished or failed run. `version`: of the registered model."""
    with _warn_on_error():
        report(run, version)


def report_night(name: str, night: dict, metric: str) -> None:
    """Show the outcome of a nightly run as a table. `metric`: the name of the accuracy that the gate compared."""
    columns = ("outcome", "champion", "candidate", "reasons")
    row = {column: escape_text(str(night.get(column, "")), 300) for column in columns}
    _create_table(name, "night", [row], f"The promotion gate's decision, by {metric}")


def report_benchmarks(name: str, scores: dict[str, list[dict]]) -> None:
    """Show the benchmark scores of each model as a table."""
    rows = [
        {"model": escape_text(model)}
        | {column: escape_text(row[column]) for column in ("task", "version", "metric", "filter")}
        | {"value": f"{row['value']:.4g}", "standard error": _or_empty(row["standard_error"]), "documents": row["n"]}
        for model, model_rows in scores.items()
        for row in model_rows
    ]
    _create_table(name, "benchmarks", rows, "Tasks of lmms-eval through its vLLM backend")


def report_study(name: str, rows: list[dict[str, str]]) -> None:
    """Show the arms of a study as a table."""
    _create_table(name, "study", rows, "Arms of the study, each at its chosen learning rate")


def _create_table(name: str, kind: str, rows: list[dict], description: str) -> None:
    with _warn_on_error():
        create_table_artifact(rows, key=artifact_key(name, kind), description=description)


def _or_empty(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


@contextmanager
def _warn_on_error() -> Iterator[None]:
    """Turn an error within a report into a warning: a report never fails a run."""
    try:
        yield
    except Exception as error:  # plotting, stores and servers raise anything
        warn(f"the run's report is incomplete: {type(error).__name__}: {redact(str(error))}")


@task(name="report", cache_policy=NO_CACHE, persist_result=False)
def report(run: Run, version: int | None) -> None:
    """Create the pages of everything that the run has made so far. `version`: of the registered model."""
    _create_links(run, version)
    _create_tables(run)
    trained = _artifacts_by_round(run, Stage.TRAIN)
    for suffix, parts in trained.items():
        _create_plots(run, suffix, parts)
    verdicts = _artifacts_by_round(run, Stage.SCORE)
    for suffix, responses in _artifacts_by_round(run, Stage.GENERATE).items():
        page = render_gallery(run.artifacts["data"], responses, verdicts.get(suffix, []), trained.get(suffix, []))
        create_markdown_artifact(page, key=artifact_key(run.config.name, f"gallery{suffix}"))


def _artifacts_by_round(run: Run, kind: Stage) -> dict[str, list[Artifact]]:
    """Group the run's artifacts of a kind by the suffix of their round, which may have one for each mask stage."""
    by_round: dict[str, list[Artifact]] = {}
    for name, artifact in run.artifacts.items():
        if name.split("-")[0] == kind:
            suffix = re.sub("-mask[0-9]+$", "", name.removeprefix(kind))
            by_round.setdefault(suffix, []).append(artifact)
    return by_round


def _create_links(run: Run, version: int | None) -> None:
    if page := run.tracker.run_url(run.tracker.run_id):
        create_link_artifact(page, "this run in MLflow", key=artifact_key(run.config.name, "mlflow-run"))
    if version and (page := run.tracker.model_url(run.config.name, version)):
        create_link_artifact(page, f"version {version} in MLflow", key=artifact_key(run.config.name, "mlflow-model"))


def _create_tables(run: Run) -> None:
    if evaluated := run.artifacts.get(Stage.EVALUATE):
        metric = accuracy_metric(run.config)
        rows = [
            {
                "model": escape_text(model),
                metric: f"{score['accuracy']:.2%}",
                "standard error": f"{score['standard_error']:.2%}",
                "questions": score["n"],
            }
            for model, score in evaluated.facts["scores"].items()
        ]
        split = run.config.evaluate.split
        description = f"Split {split}, greedy answers through vLLM; standard errors clustered by image"
        create_table_artifact(rows, key=artifact_key(run.config.name, "result"), description=description)
    rows = [
        {
            "stage": entry["name"],
            "outcome": entry["outcome"],
            "rows": entry["rows"],
            "rejected": entry["rejected"],
            "seconds": entry["seconds"],
            "MLflow": _link(run, entry["mlflow_run_id"]),
            "where": escape_text(entry["uri"], 300),
        }
        for entry in run.stages
    ]
    key = artifact_key(run.config.name, "stages")
    create_table_artifact(rows, key=key, description="Artifacts that were built or reused")
    if rows := [row for entry in run.stages for row in _signal_rows(entry)]:
        description = "Shares of responses, questions and groups from which the student learns little"
        create_table_artifact(rows, key=artifact_key(run.config.name, "signal"), description=description)


def _signal_rows(entry: dict) -> list[dict]:
    """Return rows of the table of the training signal, from a stage's entry of the summary."""
    shares: Shares = entry.get("signal", {})
    warnings = crossed_limits(shares)
    return [
        {
            "stage": entry["name"],
            "share": name.replace("_", " "),
            "value": f"{share:.1%}",
            "limit": f"{LIMITS[name].share:.0%}",
            "warning": warnings.get(name, ""),
        }
        for name, share in shares.items()
    ]


def _link(run: Run, run_id: str) -> str:
    page = run.tracker.run_url(run_id)
    return f"[{run_id[:8]}]({page})" if page else run_id


def _create_plots(run: Run, suffix: str, trained: list[Artifact]) -> None:
    """Show plots and warnings of a round's training, and store the plots in MLflow. `trained`: one for each part."""
    figures = plot_training(trained)
    warnings = [warning for part in trained for warning in part.facts["warnings"]]
    paragraphs = [f"**Warning**, step {warning['step']}: {escape_text(warning['text'], 300)}" for warning in warnings]
    paragraphs += [f"## {CAPTIONS[name]}\n\n{embed_image(content, 'png', name)}" for name, content in figures.items()]
    create_markdown_artifact("\n\n".join(paragraphs), key=artifact_key(run.config.name, f"plots{suffix}"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / f"figures{suffix}"
        folder.mkdir()
        for name, content in figures.items():
            (folder / f"{name}.png").write_bytes(content)
        run.tracker.log_files(folder)
