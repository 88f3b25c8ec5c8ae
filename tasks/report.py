"""report: what a run found out, as artifacts in Prefect's UI, and its plots in MLflow. Nothing is decided by it."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from masters.common.redaction import redact
from masters.config.stages import Stage
from masters.reporting.gallery import gallery
from masters.reporting.markdown import inert, picture
from masters.reporting.plots import plots
from masters.store.artifacts import Artifact
from masters.tasks.judges import metric_of
from masters.tasks.progress import CONSOLE, key, log
from masters.tasks.run_context import Run

CAPTIONS = {
    "training": "Loss, divergence, accuracy on the probe and mask ratio over training",
    "diagnostics": "log pi of right and wrong responses, entropy, and shares by which a failing run is seen",
    "rewards": "Rewards by source and mask ratio",
    "divergences": "Divergence by mask ratio",
}


def reported(run: Run, version: int | None) -> None:
    """Report on a run, finished or failed."""
    _harmless(lambda: report(run, version))


def night_reported(name: str, told: dict, metric: str) -> None:
    """What a night came to, as a table. `metric`: what the models were compared by."""
    row = {what: inert(str(told.get(what, "")), 300) for what in ("outcome", "champion", "candidate", "reasons")}
    _harmless(
        lambda: create_table_artifact([row], key=key(name, "night"), description=f"The gate's verdict, by {metric}")
    )


def benchmarks_reported(name: str, scores: dict[str, list[dict]]) -> None:
    """Scores of benchmarks by model, as a table."""
    rows = [
        {"model": inert(model)}
        | {what: inert(row[what]) for what in ("task", "version", "metric", "filter")}
        | {"value": f"{row['value']:.4g}", "standard error": _or_none(row["standard_error"]), "documents": row["n"]}
        for model, found in scores.items()
        for row in found
    ]
    told = "Tasks of lmms-eval through its vLLM backend"
    _harmless(lambda: create_table_artifact(rows, key=key(name, "benchmarks"), description=told))


def study_reported(name: str, rows: list[dict[str, str]]) -> None:
    """Publish the arms of a study as a table."""
    _harmless(lambda: create_table_artifact(rows, key=key(name, "study"), description="Arms at their chosen rates"))


def _or_none(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _harmless(work: Callable[[], object]) -> None:
    """What goes wrong in a report is said and fails nothing."""
    try:
        work()
    except Exception as error:  # drawing, stores and servers raise what they like
        line = f"the run's report is incomplete: {type(error).__name__}: {redact(str(error))}"
        log("warning", line)
        CONSOLE.print(f"warning: {line}", style="yellow", highlight=False, markup=False)


@task(name="report", cache_policy=NO_CACHE, persist_result=False)
def report(run: Run, version: int | None) -> None:
    """Artifacts for everything that `run` has made so far. `version`: of the registered model."""
    _links(run, version)
    _tables(run)
    for suffix, trained in _by_round(run, Stage.TRAIN).items():
        _plots(run, suffix, trained)
    verdicts, trained = _by_round(run, Stage.SCORE), _by_round(run, Stage.TRAIN)
    for suffix, responses in _by_round(run, Stage.GENERATE).items():
        page = gallery(run.made["data"], responses, verdicts.get(suffix, []), trained.get(suffix, []))
        create_markdown_artifact(page, key=key(run.config.name, f"gallery{suffix}"))


def _by_round(run: Run, kind: Stage) -> dict[str, list[Artifact]]:
    """What `run` made of a kind, by the round's suffix; of a round whose mask stages are worked on one by one, each."""
    found: dict[str, list[Artifact]] = {}
    for name, artifact in run.made.items():
        if name.split("-")[0] == kind:
            found.setdefault(re.sub("-mask[0-9]+$", "", name.removeprefix(kind)), []).append(artifact)
    return found


def _links(run: Run, version: int | None) -> None:
    if page := run.tracker.page(run.tracker.run_id):
        create_link_artifact(page, "this run in MLflow", key=key(run.config.name, "mlflow-run"))
    if version and (page := run.tracker.model_page(run.config.name, version)):
        create_link_artifact(page, f"version {version} in MLflow", key=key(run.config.name, "mlflow-model"))


def _tables(run: Run) -> None:
    if evaluated := run.made.get(Stage.EVALUATE):
        metric = metric_of(run.config)
        rows = [
            {
                "model": inert(model),
                metric: f"{score['accuracy']:.2%}",
                "standard error": f"{score['standard_error']:.2%}",
                "questions": score["n"],
            }
            for model, score in evaluated.facts["scores"].items()
        ]
        told = f"Split {run.config.evaluate.split}, greedy answers through vLLM; standard errors clustered by image"
        create_table_artifact(rows, key=key(run.config.name, "result"), description=told)
    rows = [
        {
            "stage": done["name"],
            "outcome": done["outcome"],
            "rows": done["rows"],
            "rejected": done["rejected"],
            "seconds": done["seconds"],
            "MLflow": _link(run, done["mlflow_run_id"]),
            "where": inert(done["uri"], 300),
        }
        for done in run.stages
    ]
    create_table_artifact(rows, key=key(run.config.name, "stages"), description="What was built and what reused")


def _link(run: Run, run_id: str) -> str:
    page = run.tracker.page(run_id)
    return f"[{run_id[:8]}]({page})" if page else run_id


def _plots(run: Run, suffix: str, trained: list[Artifact]) -> None:
    drawn = plots(trained)
    warnings = [one for part in trained for one in part.facts["warnings"]]
    parts = [f"**Warning**, step {one['step']}: {inert(one['text'], 300)}" for one in warnings]
    parts += [f"## {CAPTIONS[name]}\n\n{picture(content, 'png', name)}" for name, content in drawn.items()]
    create_markdown_artifact("\n\n".join(parts), key=key(run.config.name, f"plots{suffix}"))
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / f"figures{suffix}"
        figures.mkdir()
        for name, content in drawn.items():
            (figures / f"{name}.png").write_bytes(content)
        run.tracker.files(figures)
