"""Creates the tables of MLflow's database: its migration fails if several processes begin it together."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.store.db.utils import create_sqlalchemy_engine_with_retry

ADVISORY_LOCK = 0x6D61_7374_6572_73  # any number that other programs are unlikely to lock


@cache
def create_tables(uri: str) -> None:
    """Create the tables of a new database at `uri`, or wait until another process has created them.

    Does nothing for a server, which creates its own tables.
    """
    scheme, _, path = uri.partition("://")
    dialect = scheme.partition("+")[0]
    if dialect == "sqlite":
        database = Path(path.partition("?")[0].removeprefix("/"))
        with _lock_file(database):
            _create_file(database)
            MlflowClient(uri)
    elif dialect == "postgresql":
        with _lock_postgres(uri):
            MlflowClient(uri)


def _create_file(database: Path) -> None:
    """Create a SQLite database with its tables, complete or not at all.

    MLflow cannot continue a migration that a full disk or a kill has interrupted. Does nothing for a database that has
    content.
    """
    if database.is_file() and database.stat().st_size:
        return
    with tempfile.TemporaryDirectory(prefix=f".{database.name}-", dir=database.parent) as folder:
        created = Path(folder) / database.name
        MlflowClient(f"sqlite:///{created}")
        os.replace(created, database)


@contextmanager
def _lock_file(database: Path) -> Iterator[None]:
    """Hold a lock file beside a SQLite database. Without the right to write there, no table is created either.

    The file is removed at the end. Whoever waits for it then holds a lock of its own, but finds all tables.
    """
    file = database.with_name(f".{database.name}.lock")
    lock = FileLock(file)
    with suppress(OSError):
        database.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        if lock.is_locked:
            file.unlink(missing_ok=True)
        lock.release()


@contextmanager
def _lock_postgres(uri: str) -> Iterator[None]:
    """Hold an advisory lock in the database, which also excludes processes on other machines."""
    engine = create_sqlalchemy_engine_with_retry(uri)
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"select pg_advisory_lock({ADVISORY_LOCK})")
            yield
    finally:
        engine.dispose()  # ends the connection and with it the lock
