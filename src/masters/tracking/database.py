"""MLflow's database: the file of a SQLite URI, and the tables, whose migration fails if several processes begin it."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.store.db.utils import create_sqlalchemy_engine

from masters.common.errors import InputError

SQLITE = re.compile(r"(?P<scheme>sqlite(?:\+\w+)?:///)(?P<file>[^?]+)(?P<query>(?:\?.*)?)")
ADVISORY_LOCK = 0x6D61_7374_6572_73  # any number that other programs are unlikely to lock


def sqlite_file(uri: str) -> Path | None:
    """Return the absolute path of the file that a SQLite URI names; None for other URIs.

    Raises InputError for a SQLite URI without a file: a database in memory ends with its process.
    """
    if dialect_of(uri) != "sqlite":
        return None
    parts = SQLITE.fullmatch(uri)
    if parts is None or parts["file"] == ":memory:":
        raise InputError(f"expected a tracking URI like sqlite:////folder/mlflow.db, found {uri!r:.200}: name a file")
    return Path(parts["file"]).absolute()


def dialect_of(uri: str) -> str:
    """Return the part of a URI's scheme before the driver, such as "postgresql" of postgresql+psycopg2://host/name."""
    return uri.partition(":")[0].partition("+")[0]


def with_absolute_path(uri: str) -> str:
    """Return a tracking URI that names the same SQLite file in every working folder; other URIs as they are."""
    file = sqlite_file(uri)
    return SQLITE.sub(lambda parts: f"{parts['scheme']}{file}{parts['query']}", uri) if file else uri


def is_new_database(uri: str) -> bool:
    """Return whether a SQLite database does not exist yet, or has no tables yet."""
    file = sqlite_file(uri)
    return file is not None and not _has_content(file)


@cache
def create_tables(uri: str) -> None:
    """Create the tables of a new database at `uri`, or wait until another process has created them.

    Does nothing for a server, which creates its own tables.
    """
    if file := sqlite_file(uri):
        _create_file(file)
    elif dialect_of(uri) == "postgresql":
        with _lock_postgres(uri):
            MlflowClient(uri)


def _create_file(database: Path) -> None:
    """Create a SQLite database with its tables, complete or not at all, unless it has content.

    MLflow cannot continue a migration that a full disk or a kill has interrupted. A lock file keeps other processes
    out: one that creates the file again would replace what runs have written to it. Raises OSError or Timeout.
    """
    if _has_content(database):
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    lock_file = database.with_name(f".{database.name}.lock")
    with FileLock(lock_file):  # filelock 4.2.12: who waits for a file that is removed locks the next one
        try:
            if not _has_content(database):
                _create_locked(database)
        finally:
            lock_file.unlink()


def _create_locked(database: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{database.name}-", dir=database.parent) as folder:
        created = Path(folder) / database.name
        MlflowClient(f"sqlite:///{created}")
        os.replace(created, database)


def _has_content(database: Path) -> bool:
    return database.is_file() and database.stat().st_size > 0


@contextmanager
def _lock_postgres(uri: str) -> Iterator[None]:
    """Hold an advisory lock in the database, which also excludes processes on other machines."""
    engine = create_sqlalchemy_engine(uri)  # MLflow's own connection is repeated for minutes
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"select pg_advisory_lock({ADVISORY_LOCK})")
            yield
    finally:
        engine.dispose()  # ends the connection and with it the lock
