"""Runs that MLflow holds for running: which there are, and how they are ended when their process is gone."""

import os
from collections.abc import Callable, Iterator
from typing import TypeVar

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.store.entities import PagedList

from masters.common import machine
from masters.store.storage import Storage

LIVE = "attributes.status = 'RUNNING'"
PARENT = "masters.parent"  # a tag of every run that is no stage's: distillations, nights, evaluations

T = TypeVar("T")


def live(uri: str, storage: Storage) -> list[Run]:
    """Parent runs into this store that MLflow holds for running, whether they do or not."""
    client, query = MlflowClient(uri), f"{LIVE} and tags.`{PARENT}` = 'yes'"
    experiments = [e.experiment_id for e in _pages(lambda token: client.search_experiments(page_token=token))]
    found = _pages(lambda token: client.search_runs(experiments, query, max_results=1000, page_token=token))
    return [run for run in found if _may_be(run.data.tags.get("masters.store", ""), storage)]


def _may_be(store: str, storage: Storage) -> bool:
    """Whether a run's store is this one; so may be a folder that is not there, of another machine that mounts it."""
    return store == storage.uri("") or (storage.local and "://" not in store and not os.path.exists(store))


def _pages(ask: Callable[[str | None], PagedList[T]]) -> Iterator[T]:
    token = None
    while True:
        page = ask(token)
        yield from page
        if not (token := page.token):
            return


def close_lost(uri: str, storage: Storage) -> None:
    """End, as KILLED, the runs whose process on this machine is gone. Those of other machines cannot be judged."""
    client = MlflowClient(uri)
    for run in live(uri, storage):
        if machine.ended(run.data.tags.get("masters.process", "")):
            close(client, run)


def close_of(uri: str, storage: Storage, key: str) -> None:
    """End, as KILLED, the run that was made under this key, wherever its process ran."""
    client = MlflowClient(uri)
    for run in live(uri, storage):
        if run.data.tags.get("masters.key") == key:
            close(client, run)


def close(client: MlflowClient, run: Run) -> None:
    """End a run and all below it that are still held for running: stages, and a study's runs with their stages."""
    query = f"{LIVE} and tags.`mlflow.parentRunId` = '{run.info.run_id}'"
    for child in client.search_runs([run.info.experiment_id], query, max_results=1000):
        close(client, child)
    client.set_terminated(run.info.run_id, "KILLED")
