"""Settings of the local stack, from environment variables. They do not affect the results of runs."""

import os
import re
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path

from masters.common.errors import InputError
from masters.common.machine import user_folder

HOME = "MASTERS_HOME"  # environment variable: the folder of the stack
PORTS = (1, 65535)
RANGES = {
    "MASTERS_RUNS_AT_ONCE": (1, 1000),
    "MASTERS_LOST_AFTER": (31, 86400),  # a heartbeat comes every 30 s
    "MASTERS_RESUME_AFTER": (10, 86400),  # Prefect's minimum for a trigger; workers propose Crashed twice
    "MASTERS_RESUMES": (0, 1000),
}
POOL = "masters"  # work pool of the stack's worker


class Services(StrEnum):
    """The services of a stack."""

    LIGHT = "light"
    FULL = "full"


@dataclass(frozen=True)
class Settings:
    """Settings with their defaults. Each is read from the environment variable MASTERS_NAME."""

    prefect_port: int = 4200
    mlflow_port: int = 5000
    s3_port: int = 8333  # full stack only
    runs_at_once: int = 1  # concurrent runs of the pool, which shares the GPUs
    lost_after: int = 90  # seconds without a heartbeat, sent every 30 s, after which a run is lost
    resume_after: int = 15  # seconds after which a crashed run is scheduled again
    resumes: int = 3  # how often a run is scheduled again
    pools: tuple[str, ...] = ()  # further work pools for single stages, separated by commas

    @classmethod
    def from_environment(cls) -> "Settings":
        """Read the settings. Raises InputError if a number is invalid or out of range, or a pool's name is invalid."""
        numbers = {
            field.name: _read_number(f"MASTERS_{field.name.upper()}", getattr(cls, field.name))
            for field in fields(cls)
            if field.type is int
        }
        return cls(**numbers, pools=_read_pools("MASTERS_POOLS"))


def home() -> Path:
    """Return the folder of the stack's databases, files and logs: MASTERS_HOME, else ~/.local/share/masters."""
    return user_folder(HOME, ".local/share/masters")


def _read_number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    low, high = PORTS if name.endswith("_PORT") else RANGES[name]
    if not re.fullmatch("[0-9]{1,9}", text):
        raise InputError(f"{name}: expected a whole number, found {text!r}")
    if not low <= int(text) <= high:
        raise InputError(f"{name}: expected a whole number from {low} to {high}, found {text}")
    return int(text)


def _read_pools(name: str) -> tuple[str, ...]:
    pools = tuple(dict.fromkeys(pool for part in os.environ.get(name, "").split(",") if (pool := part.strip())))
    for pool in pools:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", pool):
            raise InputError(f"{name}: expected names of letters, digits, - and _, found {pool!r:.100}")
        if pool == POOL:
            raise InputError(
                f"{name}: {POOL} is the pool of whole runs: a stage on it would wait for the run that requested it"
            )
    return pools
