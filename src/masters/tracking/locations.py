"""Finds the MLflow of a store.

A store has one tracking URI: that of the MLflow in which its first run was tracked. It is written down in the store,
without secrets, and used wherever neither the configuration nor the environment names another. Where they do, that
address is written down beside it, because garbage collection spares the models with an alias in any of them.

Commands that take a name alone (`masters lineage NAME`, `masters rollback NAME`) need a store first. So this machine
keeps one note of each name: the store of its last run.
"""

import os
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from urllib.parse import unquote

from pydantic import BaseModel

from masters.common.errors import ArtifactError, InputError, StoreError
from masters.common.files import check_writable, write_atomically
from masters.common.hashing import fingerprint
from masters.common.machine import cache_folder
from masters.common.redaction import redact
from masters.config import Config, allowlist
from masters.config.allowlist import Setting
from masters.store.json_files import read_json
from masters.store.storage import Storage
from masters.tracking.client import check_server, redact_uri
from masters.tracking.database import is_new_database, sqlite_file, with_absolute_path

FOLDER = "tracking"  # of a store
NOTES = "stores"  # folder of this machine's notes
DEFAULT_DATABASE = "beside the artifacts"  # stands for the default database of a local store, which moves with it
SQLITE = "sqlite:///"
REMEDY = "it holds the address of an MLflow that tracks this store; remove it, and name that MLflow with a run"


class StoredAddress(BaseModel):
    """A file of `FOLDER`: the address of an MLflow, and when a run was first tracked there, in Unix seconds."""

    uri: str
    since: float = 0.0  # files of older versions have no time; they come before all others


def record_uri(storage: Storage, uri: str) -> None:
    """Write the address of a run's MLflow to the store, unless it is there."""
    stored = DEFAULT_DATABASE if uri == default_uri(storage) and storage.local else without_secrets(uri)
    name = f"{FOLDER}/{fingerprint(stored)}.json"
    if not storage.exists(name):
        storage.create(name, StoredAddress(uri=stored, since=time.time()).model_dump_json().encode())


def without_secrets(uri: str) -> str:
    """Return a tracking URI as the store holds it."""
    return redact(redact_uri(uri))


def recorded_uris(storage: Storage) -> dict[str, str]:
    """Map each address in the store, the first one first, to the URI of the file that holds it.

    Raises ArtifactError if a file cannot be read.
    """
    found = {name: StoredAddress(**read_json(storage, name, StoredAddress, REMEDY)) for name in storage.names(FOLDER)}
    return {
        default_uri(storage) if stored.uri == DEFAULT_DATABASE else stored.uri: storage.uri(name)
        for name, stored in sorted(found.items(), key=lambda item: item[1].since)
    }


def remember_store(name: str, storage: Storage) -> None:
    """Keep on this machine in which store the last run of this name was."""
    with suppress(OSError):  # without a writable home, commands that take a name alone need --mlflow-uri
        write_atomically(cache_folder() / NOTES / name, storage.uri(""))


def remembered_stores(name: str | None = None) -> list[str]:
    """Return the store kept for a name, or those of all names, the latest first."""
    folder = cache_folder() / NOTES
    with suppress(OSError):
        files = sorted(folder.glob("[!.]*"), key=os.path.getmtime, reverse=True)
        return list(dict.fromkeys(file.read_text() for file in files if name in (None, file.name)))
    return []


def tracking_uri(config: Config, storage: Storage) -> str:
    """Return runtime.mlflow_uri, else MLFLOW_TRACKING_URI, else the store's address, else its default database's.

    The path of a SQLite file becomes absolute, as the store keeps the address for processes in other folders.
    """
    configured = config.runtime.mlflow_uri
    if configured and redact_uri(configured) != configured:
        raise InputError(
            "runtime.mlflow_uri holds a user or password, and a configuration is kept with the run: set it as "
            "MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD beside the plain address"
        )
    if configured:
        allowlist.check_allowed(Setting.MLFLOW, "runtime.mlflow_uri", configured)
    return with_absolute_path(configured or os.environ.get("MLFLOW_TRACKING_URI") or _store_uri(storage))


def _store_uri(storage: Storage) -> str:
    """Return the address of the store's first run. A SQLite file counts only if it is on this machine for certain."""
    default = default_uri(storage)
    uri = next(iter(recorded_uris(storage)), default)
    if uri == default or ((file := sqlite_file(uri)) and not (storage.local and file.is_file())):
        _check_path(default.removeprefix(SQLITE))
        return default
    # whoever may choose a store must not thereby choose any address
    allowlist.check_allowed(Setting.MLFLOW, f"the MLflow of the store {storage.uri('')}", uri)
    return uri


def check_tracking_uri(config: Config, storage: Storage) -> str:
    """Return the address of a run's MLflow. Raises InputError if it does not answer or cannot be created."""
    uri = tracking_uri(config, storage)
    check_server(uri)
    if file := sqlite_file(uri):
        check_database(file)
    return uri


def default_uri(storage: Storage) -> str:
    """Return the address of the SQLite file beside the artifacts; for S3 it lies in the working folder."""
    return f"{SQLITE}{storage.path('mlflow.db') if storage.local else Path('mlflow.db').absolute()}"


def check_database(file: Path) -> None:
    """Raise InputError if a SQLite database cannot be written or created. Leaves no new file or folder."""
    _check_path(str(file))
    remedy = "set runtime.mlflow_uri or MLFLOW_TRACKING_URI, or start in another folder"
    if file.exists():
        try:
            open(file, "ab").close()
        except OSError as error:
            raise InputError(f"the tracking database {file} cannot be written ({error.strerror}): {remedy}") from error
    existing = next(parent for parent in file.parents if parent.exists())
    check_writable(existing, f"the tracking database {file}", remedy)


def _check_path(database: str) -> None:
    """Raise InputError if SQLAlchemy or MLflow would open another file than this one."""
    if "?" in database or unquote(database) != database:
        raise InputError(
            f"the tracking database of a run would be {database}, but its address cannot contain ? or an escape such "
            "as %20: choose another store.root or working folder, or set runtime.mlflow_uri"
        )


def default_files_folder(storage: Storage) -> str:
    """Return where the default database's experiments keep files: always local, as S3 would need another client."""
    return storage.path("mlflow") if storage.local else str(Path("mlruns").absolute())


def candidate_uris(name: str | None, mlflow_uri: str | None) -> list[str]:
    """Return `mlflow_uri`, else MLFLOW_TRACKING_URI, else the addresses in the stores that this machine keeps."""
    named = mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if named:
        return [with_absolute_path(named)]
    uris: dict[str, str] = {}
    for root in remembered_stores(name):
        with suppress(StoreError, ArtifactError) if name is None else nullcontext():  # a run id may be in another store
            uris |= recorded_uris(Storage(root, retry=False))
    return list(uris)


def check_exists(uri: str) -> None:
    """Raise InputError if there is no MLflow at this address; connecting to a missing SQLite file would create it."""
    check_server(uri)
    if is_new_database(uri):
        raise InputError(
            f"there is no MLflow database at {sqlite_file(uri)} on this machine: name the right one (--mlflow-uri, or "
            "for a command that reads a configuration MLFLOW_TRACKING_URI or runtime.mlflow_uri)"
        )
