"""Finds the MLflow of a run, and keeps the addresses that commands need later.

A store keeps the address, without secrets, of every MLflow that tracked a run into it: garbage collection spares the
models with an alias in any of them, also on machines that never made a run. This machine keeps the last address of
each name, so that `masters lineage NAME` needs no option.
"""

import json
import os
from contextlib import suppress
from pathlib import Path

from masters.common.errors import InputError
from masters.common.files import describe_place, write_atomically
from masters.common.hashing import fingerprint
from masters.common.machine import cache_folder
from masters.common.redaction import redact
from masters.config import Config, allowlist
from masters.config.allowlist import Setting
from masters.store.storage import Storage
from masters.tracking.client import check_server, redact_uri

FOLDER = "tracking"
DEFAULT_DATABASE = "beside the artifacts"  # stands for the default database of a local store, which moves with it


def record_uri(storage: Storage, uri: str, default: str) -> None:
    """Write an address to the store. `default` is the address of the store's default database."""
    stored = DEFAULT_DATABASE if uri == default and storage.local else redact(uri)
    name = f"{FOLDER}/{fingerprint(stored)}.json"
    if not storage.exists(name):
        storage.write(name, json.dumps(dict(uri=stored)).encode())


def recorded_uris(storage: Storage, default: str) -> dict[str, str]:
    """Map each address in the store to the URI of the file that holds it."""
    uris = {}
    for name in storage.names(FOLDER):
        stored = json.loads(storage.read(name))["uri"]
        uris[default if stored == DEFAULT_DATABASE else stored] = storage.uri(name)
    return uris


def remember_uri(name: str, uri: str) -> None:
    """Keep on this machine where runs of this name are tracked, for commands that take a name alone."""
    with suppress(OSError):  # without a writable home, those commands need --mlflow-uri
        write_atomically(cache_folder() / FOLDER / name, uri, mode=0o600)  # a database's address may hold its password


def remembered_uris(name: str | None = None) -> list[str]:
    """Return the address kept for a name, or those of all names, the latest first."""
    folder = cache_folder() / FOLDER
    with suppress(OSError):
        files = sorted(folder.glob("[!.]*"), key=os.path.getmtime, reverse=True)
        return list(dict.fromkeys(file.read_text() for file in files if name in (None, file.name)))
    return []


def tracking_uri(config: Config, storage: Storage) -> str:
    """Return runtime.mlflow_uri, else MLFLOW_TRACKING_URI, else the address of the default database."""
    configured = config.runtime.mlflow_uri
    if configured and redact_uri(configured) != configured:
        raise InputError(
            "runtime.mlflow_uri holds a user or password, and a configuration is kept with the run: set it as "
            "MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD beside the plain address"
        )
    if configured:
        allowlist.check_allowed(Setting.MLFLOW, "runtime.mlflow_uri", configured)
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(storage)


def check_tracking_uri(config: Config, storage: Storage) -> str:
    """Return the address of a run's MLflow. Raises InputError if it does not answer or cannot be created."""
    uri = tracking_uri(config, storage)
    check_server(uri)
    if uri == default_uri(storage):
        check_default_database(storage)
    return uri


def is_new_database(uri: str) -> bool:
    """Return whether a SQLite database does not exist yet, or has no tables yet."""
    file = Path(uri.removeprefix("sqlite:///"))
    return uri.startswith("sqlite:///") and not (file.is_file() and file.stat().st_size)


def default_uri(storage: Storage) -> str:
    """Return the address of the SQLite file beside the artifacts; for S3 it lies in the working folder."""
    return f"sqlite:///{storage.path('mlflow.db') if storage.local else Path('mlflow.db').absolute()}"


def check_default_database(storage: Storage) -> None:
    """Raise InputError if the default database cannot be created. The check of the store does not cover its folder."""
    database = default_uri(storage).removeprefix("sqlite:///")
    if invalid := {"?", "%"} & set(database):
        raise InputError(
            f"the tracking database of a run would be {database}, but its address cannot contain "
            f"{' '.join(sorted(invalid))}: choose another store.root or working folder, or set runtime.mlflow_uri"
        )
    try:
        Path(database).touch()
    except OSError as error:
        raise InputError(
            f"the tracking database {database} cannot be written: {error}; set runtime.mlflow_uri or "
            "MLFLOW_TRACKING_URI, or start in another folder"
        ) from error


def default_files_folder(storage: Storage) -> str:
    """Return where the default database's experiments keep files: always local, as S3 would need another client."""
    return storage.path("mlflow") if storage.local else str(Path("mlruns").absolute())


def candidate_uris(name: str | None, mlflow_uri: str | None) -> list[str]:
    """Return `mlflow_uri`, else MLFLOW_TRACKING_URI, else the addresses that this machine keeps, the latest first."""
    named = mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI")
    return [named] if named else remembered_uris(name)


def reachable_uris(uris: list[str]) -> list[str]:
    """Return the addresses that answer. Raises InputError if the only one does not."""
    reachable = []
    for uri in uris:
        try:
            check_exists(uri)
            reachable.append(uri)
        except InputError:
            if len(uris) == 1:
                raise
    return reachable


def check_exists(uri: str) -> None:
    """Raise InputError if there is no MLflow at this address; connecting to a missing SQLite file would create it."""
    check_server(uri)
    if uri.startswith("sqlite:///") and not (path := Path(uri.removeprefix("sqlite:///"))).is_file():
        raise InputError(
            f"there is no MLflow database at {describe_place(path)}: name the right one (--mlflow-uri, or for a "
            "command that reads a configuration MLFLOW_TRACKING_URI or runtime.mlflow_uri)"
        )
