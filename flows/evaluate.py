"""Models, given by name, on a configuration's evaluation split and on benchmarks: greedy, through vLLM."""

from dataclasses import replace

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run

from masters.checks.model_folder import LocalModel, find_model
from masters.checks.preflight import preflight
from masters.common.errors import InputError
from masters.common.machine import cache_folder
from masters.config import Config, Model, allowlist
from masters.config.allowlist import Setting
from masters.evaluation import benchmark_selection
from masters.execution.pool_request import without_pools
from masters.flows.distill import close_crashed_run
from masters.flows.retries import flow_attempt, retry_unreachable
from masters.store import artifacts
from masters.store.artifacts import Artifact
from masters.store.storage import Storage
from masters.tasks.benchmark import benchmark
from masters.tasks.data import data
from masters.tasks.evaluate import evaluate as answer
from masters.tasks.judges import accuracy_metric
from masters.tasks.progress import warn
from masters.tasks.report import report_benchmarks
from masters.tasks.run_context import Context, Run
from masters.tracking.client import redact_uri
from masters.tracking.lineage_report import find
from masters.tracking.locations import tracking_uri
from masters.tracking.run_writer import RunWriter


@flow(name="evaluate", flow_run_name="{config.name}", on_crashed=[close_crashed_run], persist_result=False)
def evaluate(
    config: Config, models: list[str], benchmarks: list[str] | None = None, benchmark_limit: int | None = None
) -> dict:
    """Accuracy of each model by answers.verifier, `n` and `standard_error`; also as a table in the run's artifacts.

    Args:
        config: Whose evaluation split is asked; its student and teachers are not, unless they are named.
        models: Folders, Hugging Face ids, or registered students: models:/NAME@ALIAS, models:/NAME/VERSION.
        benchmarks: Also these: "paper" (all 13 of the paper), one of them, such as MMStar, or a task of lmms-eval's.
        benchmark_limit: Only so many documents of each task, to try it; default: all.
    """
    with flow_attempt():
        wanted = parse_benchmarks(benchmarks, benchmark_limit)
        context = Context(without_pools(config), retry_unreachable(lambda: preflight(config)))
        asked = find_models(models, tracking_uri(config, context.storage), context.storage)
        tracker = retry_unreachable(lambda: RunWriter(config, context.storage, str(flow_run.id or ""), "evaluate"))
        status = "FAILED"
        try:
            run = Run(context, tracker)
            scores = answer(run, data(run), asked).facts["scores"]
            if flow_run.id:
                create_table_artifact([dict(model=name, **score) for name, score in scores.items()], "evaluation")
            found_out = run_benchmarks(run, asked, wanted, benchmark_limit) if wanted else {}
            status = "FINISHED"
        finally:
            if untold := tracker.finish(status):
                warn(untold)
    mlflow = dict(run_id=tracker.run_id, tracking_uri=redact_uri(tracker.uri))
    metric = accuracy_metric(config)
    return dict(metric=metric, scores=scores, benchmarks=found_out, stages=run.stages, mlflow=mlflow)


def parse_benchmarks(benchmarks: list[str] | None, limit: int | None) -> benchmark_selection.BenchmarkSelection | None:
    """The tasks that are meant, None without any. Raises InputError before anything has run."""
    if limit is not None and limit < 1:
        raise InputError(f"benchmark_limit: expected at least 1, found {limit}")
    return benchmark_selection.select_benchmarks(benchmarks) if benchmarks else None


def run_benchmarks(
    run: Run, models: list[LocalModel], wanted: benchmark_selection.BenchmarkSelection, limit: int | None
) -> dict[str, list]:
    """Scores of benchmarks by model: a row a task, metric and filter."""
    scores = {}
    for number, model in enumerate(models, 1):
        name = "benchmarks" if number == 1 else f"benchmarks-{number}"
        scores[model.name] = benchmark(run, model, wanted, limit, name).facts["scores"]
        report_benchmarks(run.config.name, scores)
    return scores


def find_models(models: list[str], tracking: str, storage: Storage) -> list[LocalModel]:
    """The models on this machine, each under the name that it was given by. `storage`: of the run."""
    if not models or len(set(models)) < len(models):
        raise InputError(f"models: expected at least one, each once, found {models}")
    return [_found(model, tracking, storage) for model in models]


def _found(model: str, tracking: str, storage: Storage) -> LocalModel:
    if not model.startswith("models:/"):
        return replace(find_model(Model(model=model)), name=model)
    student = _student(model, tracking)
    # a copy is named by its content
    folder = student.storage.download(f"{student.folder}/model", cache_folder() / "models" / student.part_digests["model"][:32])
    store = student.storage.uri("")
    made = student if store == storage.uri("") else None  # a record names only its own store
    return replace(find_model(Model(model=str(folder)), store), name=model, artifact=made)


def _student(model: str, tracking: str) -> Artifact:
    """What a version of a registered model stands for."""
    _, target = find(model, tracking)
    (folder,) = target.folders
    allowlist.check_allowed(Setting.STORES, f"the store of {target.title}", target.store)
    student = artifacts.load(Storage(target.store), folder)
    if student.record["digest"] != target.folders[folder]:
        raise InputError(f"{target.title}: {student.uri} was built again since, it is another student")
    return student
