"""Models, given by name, on a configuration's evaluation split: greedy, through vLLM."""

from pathlib import Path

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run

from masters import artifacts
from masters.config import Config, Model
from masters.errors import InputError
from masters.preflight import LocalModel, local_model, preflight
from masters.storage import Storage
from masters.tasks.data import data
from masters.tasks.evaluate import evaluate as answer
from masters.tasks.stage import Run, cache
from masters.tracking import Tracker, registered_uri, tracking_uri


@flow(name="evaluate", flow_run_name="{config.name}")
def evaluate(config: Config, models: list[str]) -> dict:
    """Exact match of each model, with `n` and `standard_error`; also as a table in the run's artifacts.

    Args:
        config: Whose evaluation split is asked; its student and teachers are not, unless they are named.
        models: Folders, Hugging Face ids, or registered students: models:/NAME@ALIAS, models:/NAME/VERSION.
    """
    ready = preflight(config)
    asked = found(models, tracking_uri(config, ready.storage))
    tracker = Tracker(config, ready.storage, "evaluate")
    status = "FAILED"
    try:
        run = Run(config, ready, tracker, frozenset())
        scores = answer(run, data(run), asked).facts["scores"]
        status = "FINISHED"
    finally:
        tracker.finish(status)
    if flow_run.id:
        create_table_artifact([dict(model=name, **score) for name, score in scores.items()], "evaluation")
    return dict(scores=scores, mlflow=dict(run_id=tracker.run_id, tracking_uri=tracker.uri))


def found(models: list[str], tracking: str) -> list[LocalModel]:
    """The models on this machine, each under the name that it was given by."""
    if not models or len(set(models)) < len(models):
        raise InputError(f"models: expected at least one, each once, found {models}")
    return [_found(model, tracking) for model in models]


def _found(model: str, tracking: str) -> LocalModel:
    folder = _student(registered_uri(tracking, model)) if model.startswith("models:/") else None
    there = local_model(Model(model=str(folder) if folder else model))
    return LocalModel(model, there.folder, there.digest)


def _student(uri: str) -> Path:
    """A registered student's folder on this machine; a copy is named by its content."""
    kind, _, name = uri.removesuffix("/model").rpartition("/")
    root, _, kind = kind.rpartition("/")
    student = artifacts.load(Storage(root), f"{kind}/{name}")
    return student.storage.download(f"{student.folder}/model", cache() / "models" / student.record["digest"][:32])
