"""Garbage collection: find, and on request remove, artifacts and leftovers in a store that nothing needs.

Kept are the artifacts behind every alias of every registered model, behind the previous champion (the target of a
rollback), behind the last run and behind running runs, and all shards that these artifacts contain. While a run is
running, all shards and all unfinished work are kept, because nobody can say which of them it will need.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from pydantic import BaseModel

from masters.common import machine
from masters.common.errors import InputError
from masters.common.hashing import fingerprint
from masters.common.redaction import redact
from masters.config import Config
from masters.config.stages import Stage
from masters.store import artifacts, lineage
from masters.store.artifacts import RECORD
from masters.store.json_files import read_json
from masters.store.storage import Storage, open_storage, work_folder
from masters.tracking import locations, open_runs
from masters.tracking.locations import check_exists
from masters.tracking.registry import Registry

MIN_AGE = 24 * 3600  # seconds; younger files are kept unless they are finished artifacts
NOTE_FOLDERS = ("leases", "handed")  # where runs and their workers leave notes for each other
QUERY_INTERVAL = 1.0  # seconds; a run that starts takes longer than this to reach its first stage


class SummarizedStage(BaseModel):
    uri: str


class SummaryForm(BaseModel):
    """The part of the last run's summary that names its artifacts."""

    stages: list[SummarizedStage]


@dataclass(frozen=True)
class Item:
    """A folder or file that nothing needs, in the store or among the work folders of this machine."""

    kind: Literal["artifact", "unfinished", "shard", "judgements", "note", "work"]
    storage: Storage
    name: str
    bytes: int
    why: str


@dataclass
class Reachable:
    """Artifacts and files that are still needed."""

    folders: set[str]  # of artifacts
    shards: set[str]  # shard files, and folders of judgements
    running: set[str]  # fingerprints of the stages of running runs
    has_running_runs: bool
    notes: list[str]
    is_incomplete: bool = False  # a record does not name its inputs, so no finished artifact may be removed


def collect_garbage(config: Config, delete: bool = False) -> dict:
    """List what nothing needs, and remove it if `delete`.

    Returns `items` (kind, uri, bytes, why), their `bytes`, the number of `kept` artifacts, `notes` and `deleted`.
    """
    storage = open_storage(config.store.root)
    registries, unreachable = _find_registries(config, storage)
    if delete and unreachable:
        raise InputError(
            "nothing is removed, because an MLflow server that knows this store cannot be reached: "
            f"{'; '.join(unreachable)}"
        )
    reachable = find_reachable(registries, storage)
    reachable.notes += [f"{reason}; --delete is refused" for reason in unreachable]
    items = [
        *_find_artifacts(storage, reachable),
        *_find_shards(storage, reachable),
        *_find_notes(storage, reachable),
        *_find_work_folders(storage, reachable),
    ]
    if delete:
        running_stages = _RunningStages(registries, storage)
        items = [item for item in items if _remove(item, running_stages)]
        storage.remove_unfinished_writes("")
    return dict(
        items=[dict(kind=i.kind, uri=i.storage.uri(i.name), bytes=i.bytes, why=i.why) for i in items],
        bytes=sum(item.bytes for item in items),
        kept=len(reachable.folders),
        notes=reachable.notes,
        deleted=delete,
    )


def find_reachable(registries: list[Registry], storage: Storage) -> Reachable:
    """Find everything behind aliases, the last run and running runs."""
    running, notes = _find_running(registries, storage)
    roots = _registered_folders(registries, storage) | _last_run_folders(storage) | _finished_folders(storage, running)
    nodes = lineage.walk(storage, dict.fromkeys(roots, ""), verify_files=False)
    reachable = Reachable({node.folder for node in nodes}, set(), running, bool(notes), notes)
    for node in nodes:
        if node.record is None or "upstream" not in node.record:
            reachable.is_incomplete = True
            notes.append(f"the record of {node.uri} does not name its inputs: no finished artifact is removed")
            continue
        reachable.shards |= {f"shards/{file['name']}" for file in node.record["files"]}
        if node.record["stage"].startswith(Stage.SCORE):
            judge_settings = {key: value for key, value in node.record["config"].items() if key != "judge"}
            reachable.shards.add(f"shards/judgements/{fingerprint(judge_settings)}")
    return reachable


def _find_registries(config: Config, storage: Storage) -> tuple[list[Registry], list[str]]:
    """Return the registries of every MLflow that knows this store, and a message for each that cannot be reached.

    An MLflow is known to the store if a run of the store was tracked in it. Raises InputError if the MLflow of the
    configuration cannot be reached.
    """
    configured = locations.tracking_uri(config, storage)
    check_exists(configured)
    reachable, unreachable = [configured], []
    for uri, file in locations.recorded_uris(storage).items():
        if uri == locations.without_secrets(configured):
            continue
        if error := _query_error(uri):
            unreachable.append(f"MLflow at {uri}: {error}; if it no longer exists, remove {file}")
        else:
            reachable.append(uri)
    return [Registry(uri) for uri in reachable], unreachable


def _query_error(uri: str) -> str | None:
    """Return why an MLflow cannot be queried for its models, None if it can."""
    try:
        check_exists(uri)
        Registry(uri).protected_artifacts()
    except Exception as error:  # database drivers raise errors of their own types
        return redact(str(error)).partition("\n")[0]
    return None


def _last_run_folders(storage: Storage) -> set[str]:
    if not storage.exists("summary.json"):
        return set()
    summary = read_json(storage, "summary.json", SummaryForm, "the next run writes it again")
    # the end of the address: the store may have been moved since
    return {"/".join(stage["uri"].split("/")[-2:]) for stage in summary["stages"]}


def _registered_folders(registries: list[Registry], storage: Storage) -> set[str]:
    """Return the folders of registered models that have an alias or are the target of a rollback."""
    root = f"{storage.uri('')}/"
    registered = {artifact for registry in registries for artifact in registry.protected_artifacts()}
    folders = {uri.removeprefix(root).removesuffix("/model") for uri, _, _ in registered if uri.startswith(root)}
    # A store that was moved or is mounted elsewhere too has registered its models under another address.
    return folders | {
        folder for uri, folder, digest in registered if not uri.startswith(root) and _contains(storage, folder, digest)
    }


def _contains(storage: Storage, folder: str, digest: str) -> bool:
    return (
        bool(folder)
        and storage.exists(f"{folder}/{RECORD}")
        and artifacts.load(storage, folder).record["digest"] == digest
    )


def _find_running(registries: list[Registry], storage: Storage) -> tuple[set[str], list[str]]:
    """Return the fingerprints of the stages of running runs, and a note per run."""
    fingerprints, notes = set(), []
    for registry in registries:
        for run in open_runs.find_open_runs(registry.uri, storage):
            process = run.data.tags.get("masters.process", "")
            if machine.has_ended(process):
                continue
            stages = registry.stage_runs(run.info.experiment_id, run.info.run_id)
            fingerprints |= {stage.data.tags["masters.fingerprint"] for stage in stages}
            notes.append(
                f"run {run.info.run_id} is running (process: {process or 'unknown'}): its artifacts, all shards and "
                "all unfinished work are kept; if it is not running, end it in MLflow"
            )
    return fingerprints, notes


def _finished_folders(storage: Storage, fingerprints: set[str]) -> set[str]:
    """Return the folders of finished artifacts with one of these fingerprints."""
    folders = (f"{kind}/{name}" for kind in Stage for name in storage.children(kind))
    return {f for f in folders if _fingerprint_of(f) in fingerprints and storage.exists(f"{f}/{RECORD}")}


def _find_artifacts(storage: Storage, reachable: Reachable) -> Iterator[Item]:
    """Find finished artifacts, and old folders of unfinished ones."""
    for kind in Stage:
        folders: dict[str, dict[str, tuple[int, float]]] = {}
        for name, details in storage.details(kind).items():
            folders.setdefault("/".join(name.split("/")[:2]), {})[name] = details
        for folder, files in folders.items():
            is_finished = f"{folder}/{RECORD}" in files
            if folder in reachable.folders or _fingerprint_of(folder) in reachable.running:
                continue
            size = sum(size for size, _ in files.values())
            if is_finished and not reachable.is_incomplete:
                yield Item("artifact", storage, folder, size, "not needed by any model or run")
            elif not is_finished and not reachable.has_running_runs and _are_old(files.values()):
                yield Item("unfinished", storage, folder, size, "unfinished for more than a day")


def _find_shards(storage: Storage, reachable: Reachable) -> Iterator[Item]:
    """Find files of responses, predictions and judgements."""
    if reachable.has_running_runs or reachable.is_incomplete:
        return
    for name, details in storage.details("shards").items():
        folder = str(PurePosixPath(name).parent)
        if name not in reachable.shards and folder not in reachable.shards and _are_old([details]):
            kind = "judgements" if name.startswith("shards/judgements/") else "shard"
            yield Item(kind, storage, name, details[0], "not part of any artifact that is kept")


def _find_notes(storage: Storage, reachable: Reachable) -> Iterator[Item]:
    """Find leases and stage requests of runs that have ended."""
    if reachable.has_running_runs:
        return
    for prefix in NOTE_FOLDERS:
        for name, details in storage.details(prefix).items():
            if _are_old([details]):
                yield Item("note", storage, name, details[0], "no run is running")


def _find_work_folders(storage: Storage, reachable: Reachable) -> Iterator[Item]:
    """Find job files, logs and downloads of runs on this machine."""
    if reachable.has_running_runs or not (folder := work_folder(storage)).is_dir():
        return
    local = Storage(str(folder))
    for name in local.children(""):
        files = local.details(name).values()
        if _are_old(files):
            yield Item("work", local, name, sum(size for size, _ in files), "not changed for more than a day")


class _RunningStages:
    """Repeats `_find_running` during the removal: for every item while runs are running, otherwise every second."""

    def __init__(self, registries: list[Registry], storage: Storage) -> None:
        self._registries, self._storage = registries, storage
        self._queried_at = -math.inf
        self._fingerprints: set[str] = set()
        self._has_running_runs = False

    def query(self) -> tuple[set[str], bool]:
        """Return the fingerprints of the stages of running runs, and whether there are running runs."""
        if self._has_running_runs or time.monotonic() - self._queried_at > QUERY_INTERVAL:
            self._fingerprints, notes = _find_running(self._registries, self._storage)
            self._has_running_runs, self._queried_at = bool(notes), time.monotonic()
        return self._fingerprints, self._has_running_runs


def _remove(item: Item, running_stages: _RunningStages) -> bool:
    """Remove an item and return True, unless a run that has started meanwhile may need it."""
    running, has_running_runs = running_stages.query()
    if _fingerprint_of(item.name) in running or (has_running_runs and item.kind != "artifact"):
        return False
    if item.kind in ("shard", "judgements", "note"):
        item.storage.remove(item.name)
    else:
        artifacts.remove(item.storage, item.name)
        item.storage.remove_empty_folders(item.name)
    return True


def _fingerprint_of(folder: str) -> str:
    return folder.rsplit("-", 1)[-1]


def _are_old(files: Iterable[tuple[int, float]]) -> bool:
    """Return whether no file was written within MIN_AGE. `files`: size and time of the last write of each."""
    return all(time.time() - written > MIN_AGE for _, written in files)
