"""Where runs are tracked: which MLflow a run goes to, and which ones a store and this machine know of.

A store keeps the addresses without secrets. What aliases stand for in one of these MLflows must not be removed; a
machine that never made a run must know of it.
"""

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path

from masters.common.errors import InputError
from masters.common.hashing import fingerprint
from masters.common.machine import cache
from masters.common.redaction import redact
from masters.config import Config, allowlist
from masters.config.allowlist import Setting
from masters.store.storage import Storage
from masters.tracking.client import check_answers, redact_uri

FOLDER = "tracking"
BESIDE = "beside the artifacts"  # the default database of a local store moves with it

KEPT = 20  # tracking URIs a name


def note(storage: Storage, uri: str, default: str) -> None:
    """Keep an address. `default`: that of the database beside the artifacts. One file each: nobody overwrites."""
    told = BESIDE if uri == default and storage.local else redact(uri)
    name = f"{FOLDER}/{fingerprint(told)}.json"
    if not storage.exists(name):
        storage.write(name, json.dumps(dict(uri=told)).encode())


def noted(storage: Storage, default: str) -> dict[str, str]:
    """The addresses, each with the URI of the file that says so."""
    found = {}
    for name in storage.names(FOLDER):
        told = json.loads(storage.read(name))["uri"]
        found[default if told == BESIDE else told] = storage.uri(name)
    return found


def remember(name: str, tracking_uri: str) -> None:
    """Keep where runs of this name are tracked, for commands that are given a name alone."""
    file = _state()
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with suppress(OSError):  # a home that cannot be written costs an option on the command line, not a run
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file.with_name(f".{file.name}.lock"), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go of as the file is closed
            _remember(name, tracking_uri, file, temporary)


def _remember(name: str, tracking_uri: str, file: Path, temporary: Path) -> None:
    uris = [tracking_uri, *(uri for uri in remembered(name) if uri != tracking_uri)][:KEPT]
    temporary.touch(mode=0o600)  # the address of a database may hold its password
    temporary.write_text(json.dumps(_remembered() | {name: uris}, indent=1))
    os.replace(temporary, file)


def remembered(name: str | None = None) -> list[str]:
    """Tracking URIs of a name, the last one first; without a name those of all."""
    known = _remembered()
    if name is not None:
        return known.get(name, [])
    return list(dict.fromkeys(uri for uris in known.values() for uri in uris))


def _state() -> Path:
    return cache() / "tracking.json"


def _remembered() -> dict[str, list[str]]:
    try:
        return json.loads(_state().read_text())
    except (OSError, ValueError):
        return {}


def tracking_uri(config: Config, storage: Storage) -> str:
    """runtime.mlflow_uri, else MLFLOW_TRACKING_URI, else a SQLite file beside the artifacts (S3: in this folder)."""
    named = config.runtime.mlflow_uri
    if named and redact_uri(named) != named:
        raise InputError(
            "runtime.mlflow_uri holds a user or password, and a configuration is kept with the run: set it as "
            "MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD beside the plain address"
        )
    if named:
        allowlist.check(Setting.MLFLOW, "runtime.mlflow_uri", named)
    return named or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(storage)


def default_uri(storage: Storage) -> str:
    return f"sqlite:///{storage.path('mlflow.db') if storage.local else Path('mlflow.db').absolute()}"


def check_beside(storage: Storage) -> None:
    """Raises InputError if the default database cannot be made: unlike the store, the working folder is not proven."""
    database = default_uri(storage).removeprefix("sqlite:///")
    if strange := {"?", "%"} & set(database):
        raise InputError(
            f"the tracking database of a run goes to {database}, whose address cannot hold {' '.join(sorted(strange))}"
            ": choose a store.root or a working folder without, or set runtime.mlflow_uri"
        )
    try:
        Path(database).touch()
    except OSError as error:
        raise InputError(
            f"the tracking database of a run goes into the working folder, which cannot be written: {error}; "
            "set runtime.mlflow_uri or MLFLOW_TRACKING_URI, or start elsewhere"
        ) from error


def files_beside(storage: Storage) -> str:
    """Where a new experiment of that database keeps its files: on this machine too, S3 would ask for a client more."""
    return storage.path("mlflow") if storage.local else str(Path("mlruns").absolute())


def uris(name: str | None, mlflow_uri: str | None) -> list[str]:
    """The MLflow that is named, else the environment's, else those that this machine's runs used, the last first."""
    named = mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI")
    return [named] if named else remembered(name)


def available(tried: list[str]) -> list[str]:
    """Those that can be asked; of a single one InputError says why not."""
    there = []
    for uri in tried:
        try:
            check_there(uri)
            there.append(uri)
        except InputError:
            if len(tried) == 1:
                raise
    return there


def check_there(uri: str) -> None:
    """Raises InputError if there is no such MLflow: asking for a SQLite file would make it."""
    check_answers(uri)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise InputError(
            f"there is no MLflow database at {uri}: name the right one (--mlflow-uri, or for a command that reads a "
            "configuration MLFLOW_TRACKING_URI or runtime.mlflow_uri)"
        )
