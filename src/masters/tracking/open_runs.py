"""Finds runs that MLflow shows as running, and ends those whose process is gone."""

import os
from collections.abc import Callable, Iterator
from typing import TypeVar

from mlflow import MlflowClient
from mlflow.entities import Run, RunStatus
from mlflow.store.entities import PagedList

from masters.common import machine
from masters.store.storage import Storage
from masters.tracking.client import client as mlflow_client

RUNNING = "attributes.status = 'RUNNING'"
PARENT = "masters.parent"  # tag of every run that is not a stage's: distillations, nights, evaluations

T = TypeVar("T")


def find_open_runs(uri: str, storage: Storage) -> list[Run]:
    """Return the parent runs into this store that MLflow shows as running, whether or not their process is alive."""
    client, query = mlflow_client(uri), f"{RUNNING} and tags.`{PARENT}` = 'yes'"
    experiments = [e.experiment_id for e in _read_pages(lambda token: client.search_experiments(page_token=token))]
    found = _read_pages(lambda token: client.search_runs(experiments, query, max_results=1000, page_token=token))
    return [run for run in found if _may_be_store(run.data.tags.get("masters.store", ""), storage)]


def _may_be_store(address: str, storage: Storage) -> bool:
    """Return whether a run's store may be this one: a missing local folder may be where another machine mounts it."""
    return address == storage.uri("") or (storage.local and "://" not in address and not os.path.exists(address))


def _read_pages(search: Callable[[str | None], PagedList[T]]) -> Iterator[T]:
    token = None
    while True:
        page = search(token)
        yield from page
        if not (token := page.token):
            return


def end_lost_runs(uri: str, storage: Storage) -> None:
    """End, as KILLED, the runs whose process on this machine is gone. Other machines' processes are unknown."""
    client = mlflow_client(uri)
    for run in find_open_runs(uri, storage):
        # read again: it may have finished after it was found, and before its process ended
        has_ended = machine.has_ended(run.data.tags.get("masters.process", ""))
        if has_ended and client.get_run(run.info.run_id).info.status == RunStatus.to_string(RunStatus.RUNNING):
            end_run(client, run)


def end_runs_with_key(uri: str, storage: Storage, key: str) -> None:
    """End, as KILLED, the open runs with this key, wherever their process ran."""
    client = mlflow_client(uri)
    for run in find_open_runs(uri, storage):
        if run.data.tags.get("masters.key") == key:
            end_run(client, run)


def end_run(client: MlflowClient, run: Run) -> None:
    """End a run and all running ones below it: stages, and a study's runs with their stages."""
    end_children(client, run.info.experiment_id, run.info.run_id)
    client.set_terminated(run.info.run_id, "KILLED")


def end_children(client: MlflowClient, experiment_id: str, run_id: str) -> None:
    """End, as KILLED, all running runs below a run."""
    query = f"{RUNNING} and tags.`mlflow.parentRunId` = '{run_id}'"
    for child in client.search_runs([experiment_id], query, max_results=1000):
        end_run(client, child)
