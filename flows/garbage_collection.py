"""What in a store no champion, candidate or live run reaches, and its removal.

Spared are the artifacts behind every alias of every registered model, behind the champion before (a rollback leads
there), behind the last run and behind runs that are under way, and the shards that these are made of. While a run is
under way, shards and unfinished work stay altogether: nobody can say which of them it will want.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from masters.common import machine
from masters.common.errors import InputError
from masters.common.hashing import fingerprint
from masters.common.redaction import redact
from masters.config import Config
from masters.config.stages import Stage
from masters.store import artifacts, lineage
from masters.store.artifacts import RECORD
from masters.store.storage import Storage, open_storage, work_folder
from masters.tracking import locations, open_runs
from masters.tracking.client import redact_uri
from masters.tracking.locations import check_exists
from masters.tracking.registry import Registry

MIN_AGE = 24 * 3600  # seconds: what was written since is kept, though nothing reaches it
NOTES = ("leases", "handed")  # where runs and their workers leave each other word
ASKED_AGAIN = 1.0  # seconds: a run that begins has its first stage later than that


@dataclass(frozen=True)
class Item:
    """Something that may go: a folder or a file of the store, or of the work folders on this machine."""

    kind: str  # "artifact", "unfinished", "shard", "judgements", "note", "work"
    storage: Storage
    name: str
    bytes: int
    why: str

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self.name)


@dataclass
class Spared:
    """What is reached."""

    folders: set[str]  # of artifacts
    shards: set[str]  # files, and folders of judges' answers
    live: set[str]  # fingerprints of what runs under way have or build
    busy: bool  # a run is under way
    notes: list[str]
    everything: bool = False  # what some record read is not known: nothing finished may go


def collect_garbage(config: Config, delete: bool = False) -> dict:
    """List what may go, or remove it: `items` (kind, uri, bytes, why), `bytes`, `kept` artifacts, `notes`."""
    storage = open_storage(config.store.root)
    registries, silent = _registries(config, storage)
    if delete and silent:
        raise InputError(
            f"nothing is removed while an MLflow that knows this store cannot be asked: {'; '.join(silent)}"
        )
    spared = reached(registries, storage)
    spared.notes += [f"{why}; --delete is refused" for why in silent]
    items = [*_artifacts(storage, spared), *_shards(storage, spared), *_notes(storage, spared), *_work(storage, spared)]
    if delete:
        under_way = _UnderWay(registries, storage)
        items = [item for item in items if _removed(item, under_way)]
        storage.remove_unfinished_writes("")
    listed = [dict(kind=i.kind, uri=i.storage.uri(i.name), bytes=i.bytes, why=i.why) for i in items]
    return dict(
        items=listed, bytes=sum(i.bytes for i in items), kept=len(spared.folders), notes=spared.notes, deleted=delete
    )


def reached(registries: list[Registry], storage: Storage) -> Spared:
    """Everything behind aliases, the last run and runs under way."""
    live, notes = _under_way(registries, storage)
    roots = _registered(registries, storage) | _last_run(storage) | _folders_of(storage, live)
    links = lineage.walk(storage, dict.fromkeys(roots, ""), verify_files=False)
    spared = Spared({link.folder for link in links}, set(), live, bool(notes), notes)
    for link in links:
        if link.record is None or "upstream" not in link.record:
            spared.everything = True
            notes.append(f"{link.uri} does not say what it was made from: no finished artifact is removed")
            continue
        spared.shards |= {f"shards/{file['name']}" for file in link.record["files"]}
        if link.record["stage"].startswith(Stage.SCORE):
            said = {key: value for key, value in link.record["config"].items() if key != "judge"}
            spared.shards.add(f"shards/judgements/{fingerprint(said)}")
    return spared


def _registries(config: Config, storage: Storage) -> tuple[list[Registry], list[str]]:
    """Every MLflow that tracked a run into this store and those known to this machine; and of which none answers, why.

    Raises InputError if the configuration's own cannot be asked.
    """
    named = locations.tracking_uri(config, storage)
    check_exists(named)
    known = {redact_uri(uri): uri for uri in [*locations.remembered_uris(), named]}  # with what a note must not hold
    told = locations.recorded_uris(storage, locations.default_uri(storage))
    if last := _summary(storage).get("mlflow", {}).get("tracking_uri"):
        told.setdefault(last, storage.uri("summary.json"))
    asked, silent = [named], []
    for uri, note in told.items():
        if why := _unasked(known.get(uri, uri)):
            silent.append(f"MLflow at {uri}: {why}; if it is gone for good, remove {note}")
        else:
            asked.append(known.get(uri, uri))
    asked += [uri for told_as, uri in known.items() if told_as not in told and not _unasked(uri)]
    return [Registry(uri) for uri in dict.fromkeys(asked)], silent


def _unasked(uri: str) -> str | None:
    """Why an MLflow cannot be asked for its models."""
    try:
        check_exists(uri)
        Registry(uri).protected_artifacts()
    except Exception as error:  # drivers of databases raise what they like
        return redact(str(error)).partition("\n")[0]
    return None


def _summary(storage: Storage) -> dict:
    return json.loads(storage.read("summary.json")) if storage.exists("summary.json") else {}


def _last_run(storage: Storage) -> set[str]:
    root = f"{storage.uri('')}/"
    return {stage["uri"].removeprefix(root) for stage in _summary(storage).get("stages", [])}


def _registered(registries: list[Registry], storage: Storage) -> set[str]:
    """Folders that an alias of a registered model stands for, or that a rollback would lead to."""
    root = f"{storage.uri('')}/"
    found = {wanted for registry in registries for wanted in registry.protected_artifacts()}
    here = {uri.removeprefix(root).removesuffix("/model") for uri, _, _ in found if uri.startswith(root)}
    # registered while the store had another address: it was moved, or is mounted elsewhere too
    return here | {
        folder for uri, folder, digest in found if not uri.startswith(root) and _holds(storage, folder, digest)
    }


def _holds(storage: Storage, folder: str, digest: str) -> bool:
    return (
        bool(folder)
        and storage.exists(f"{folder}/{RECORD}")
        and artifacts.load(storage, folder).record["digest"] == digest
    )


def _under_way(registries: list[Registry], storage: Storage) -> tuple[set[str], list[str]]:
    """Fingerprints of the stages of live runs, and a note a run."""
    found, notes = set(), []
    for registry in registries:
        for run in open_runs.find_open_runs(registry.uri, storage):
            process = run.data.tags.get("masters.process", "")
            if machine.has_ended(process):
                continue
            stages = registry.stage_runs(run.info.experiment_id, run.info.run_id)
            found |= {stage.data.tags["masters.fingerprint"] for stage in stages}
            notes.append(
                f"run {run.info.run_id} is under way ({process or 'of an unknown process'}): what it has, all shards "
                "and all unfinished work are kept; if it is not, end it in MLflow"
            )
    return found, notes


def _folders_of(storage: Storage, fingerprints: set[str]) -> set[str]:
    """Finished artifacts with one of these fingerprints."""
    folders = (f"{kind}/{name}" for kind in Stage for name in storage.children(kind))
    return {f for f in folders if _fingerprint(f) in fingerprints and storage.exists(f"{f}/{RECORD}")}


def _artifacts(storage: Storage, spared: Spared) -> Iterator[Item]:
    for kind in Stage:
        folders: dict[str, dict[str, tuple[int, float]]] = {}
        for name, found in storage.details(kind).items():
            folders.setdefault("/".join(name.split("/")[:2]), {})[name] = found
        for folder, files in folders.items():
            finished = f"{folder}/{RECORD}" in files
            if folder in spared.folders or _fingerprint(folder) in spared.live or (finished and spared.everything):
                continue
            size, written = sum(size for size, _ in files.values()), max(at for _, at in files.values())
            if finished:
                yield Item("artifact", storage, folder, size, "nothing reaches it")
            elif _old(written) and not spared.busy:
                yield Item("unfinished", storage, folder, size, "unfinished for more than a day")


def _shards(storage: Storage, spared: Spared) -> Iterator[Item]:
    """Files of responses and predictions, and judges' answers."""
    if spared.busy or spared.everything:
        return
    for name, (size, written) in storage.details("shards").items():
        group = str(PurePosixPath(name).parent)
        if name not in spared.shards and group not in spared.shards and _old(written):
            kind = "judgements" if name.startswith("shards/judgements/") else "shard"
            yield Item(kind, storage, name, size, "no reached artifact holds it")


def _notes(storage: Storage, spared: Spared) -> Iterator[Item]:
    """What runs that are over told others: who builds an artifact, which stage a worker is asked for."""
    if spared.busy:
        return
    for prefix in NOTES:
        for name, (size, written) in storage.details(prefix).items():
            if _old(written):
                yield Item("note", storage, name, size, "no run is under way")


def _work(storage: Storage, spared: Spared) -> Iterator[Item]:
    """Job files, logs and copies of this machine's runs."""
    if spared.busy or not (folder := work_folder(storage)).is_dir():
        return
    here = Storage(str(folder))
    for name in here.children(""):
        files = here.details(name).values()
        if all(_old(written) for _, written in files):
            yield Item("work", here, name, sum(size for size, _ in files), "not written to for more than a day")


class _UnderWay:
    """`_under_way` while things are removed: asked for each of them as long as there is a run, else every second."""

    def __init__(self, registries: list[Registry], storage: Storage) -> None:
        self._ask, self._at = lambda: _under_way(registries, storage), -math.inf
        self._found: tuple[set[str], list[str]] = set(), []

    def __call__(self) -> tuple[set[str], list[str]]:
        if self._found[1] or time.monotonic() - self._at > ASKED_AGAIN:
            self._found, self._at = self._ask(), time.monotonic()
        return self._found


def _removed(item: Item, under_way: _UnderWay) -> bool:
    """Remove it, unless a run that began meanwhile came upon it."""
    live, notes = under_way()
    if item.fingerprint in live or (notes and item.kind != "artifact"):
        return False
    if item.kind in ("shard", "judgements", "note"):
        item.storage.remove(item.name)
    else:
        artifacts.remove(item.storage, item.name)
        item.storage.remove_empty_folders(item.name)
    return True


def _fingerprint(name: str) -> str:
    return name.rsplit("-", 1)[-1]


def _old(written: float) -> bool:
    return time.time() - written > MIN_AGE
