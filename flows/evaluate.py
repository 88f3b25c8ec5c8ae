"""Evaluation of models on a configuration's evaluation split and on benchmarks."""

from dataclasses import replace

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run

from masters.checks.model_folder import LocalModel, download_student, find_model
from masters.checks.preflight import preflight
from masters.common.errors import InputError
from masters.config import Config, Model, allowlist
from masters.config.allowlist import Setting
from masters.evaluation.benchmark_selection import BenchmarkSelection, select_benchmarks
from masters.execution.pool_request import without_pools
from masters.flows.distill import close_crashed_run, finish_with_status, open_tracker
from masters.flows.retries import flow_attempt, retry_unreachable
from masters.store import artifacts
from masters.store.artifacts import Artifact
from masters.store.storage import Storage
from masters.tasks.benchmark import benchmark
from masters.tasks.data import data
from masters.tasks.evaluate import evaluate as evaluate_models
from masters.tasks.judges import accuracy_metric
from masters.tasks.report import report_benchmarks
from masters.tasks.run_context import Context, Run
from masters.tracking.client import redact_uri
from masters.tracking.lineage_report import find_target
from masters.tracking.locations import tracking_uri


@flow(name="evaluate", flow_run_name="{config.name}", on_crashed=[close_crashed_run], persist_result=False)
def evaluate(
    config: Config, models: list[str], benchmarks: list[str] | None = None, benchmark_limit: int | None = None
) -> dict:
    """Evaluate models on a configuration's evaluation split, greedily through vLLM, and on benchmarks.

    Returns each model's accuracy, `n` and `standard_error`, and the benchmark scores. The accuracies are also a table
    among the artifacts of the flow run.

    Args:
        config: The configuration whose evaluation split and settings are used. Its own student and teachers are only
            evaluated if they are named in models.
        models: Folders, Hugging Face ids, or registered students (models:/NAME@ALIAS, models:/NAME/VERSION).
        benchmarks: Benchmarks to run too: "paper" (all 13 of the paper), one of them, such as MMStar, or an lmms-eval
            task.
        benchmark_limit: Maximum number of documents per task, for a quick trial. Default: all.
    """
    with flow_attempt():
        selection = parse_benchmarks(benchmarks, benchmark_limit)
        context = Context(without_pools(config), retry_unreachable(lambda: preflight(config)))
        found = find_models(models, tracking_uri(config, context.storage), context.storage)
        tracker = open_tracker(config, context.storage, "evaluate")
        with finish_with_status(tracker):
            run = Run(context, tracker)
            scores = evaluate_models(run, data(run), found).facts["scores"]
            if flow_run.id:
                rows = [dict(model=name, **score) for name, score in scores.items()]
                create_table_artifact(rows, "evaluation")
            benchmark_scores = run_benchmarks(run, found, selection, benchmark_limit) if selection else {}
    return dict(
        metric=accuracy_metric(config),
        scores=scores,
        benchmarks=benchmark_scores,
        stages=run.stages,
        mlflow=dict(run_id=tracker.run_id, tracking_uri=redact_uri(tracker.uri)),
    )


def parse_benchmarks(benchmarks: list[str] | None, limit: int | None) -> BenchmarkSelection | None:
    """Return the selected benchmark tasks, or None if there are none. Raises InputError before anything runs."""
    if limit is not None and limit < 1:
        raise InputError(f"benchmark_limit: expected at least 1, found {limit}")
    return select_benchmarks(benchmarks) if benchmarks else None


def run_benchmarks(
    run: Run, models: list[LocalModel], selection: BenchmarkSelection, limit: int | None
) -> dict[str, list]:
    """Return the benchmark scores by model, with a row per task, metric and filter."""
    scores = {}
    for number, model in enumerate(models, 1):
        stage_name = "benchmarks" if number == 1 else f"benchmarks-{number}"
        scores[model.name] = benchmark(run, model, selection, limit, stage_name).facts["scores"]
        report_benchmarks(run.config.name, scores)
    return scores


def find_models(models: list[str], tracking: str, storage: Storage) -> list[LocalModel]:
    """Find the models on this machine, each under the given name. `storage` is the run's store."""
    if not models or len(set(models)) < len(models):
        raise InputError(f"models: expected at least one model and none twice, found {models}")
    return [_find_model(model, tracking, storage) for model in models]


def _find_model(model: str, tracking: str, storage: Storage) -> LocalModel:
    if not model.startswith("models:/"):
        return replace(find_model(Model(model=model)), name=model)
    student = _find_student(model, tracking)
    folder = download_student(student)
    store = student.storage.uri("")
    artifact = student if store == storage.uri("") else None  # a record may only name artifacts of its own store
    return replace(find_model(Model(model=str(folder)), store), name=model, artifact=artifact)


def _find_student(model: str, tracking: str) -> Artifact:
    """Return the artifact of a registered model's version."""
    _, target = find_target(model, tracking)
    (folder,) = target.folders
    allowlist.check_allowed(Setting.STORES, f"the store of {target.title}", target.store)
    student = artifacts.load(Storage(target.store), folder)
    if student.record["digest"] != target.folders[folder]:
        raise InputError(f"{target.title}: {student.uri} was built again since, so it is another student")
    return student
