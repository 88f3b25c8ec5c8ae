"""Settings of the local stack, from the environment: nothing here concerns what a run makes."""

import os
import re
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path

from masters.common.errors import InputError

PORTS = (1, 65535)
RANGES = {
    "MASTERS_RUNS_AT_ONCE": (1, 1000),
    "MASTERS_LOST_AFTER": (31, 86400),  # a heartbeat comes every 30 s
    "MASTERS_RESUME_AFTER": (10, 86400),  # what Prefect takes of a trigger, and Crashed is proposed twice
    "MASTERS_RESUMES": (0, 1000),
}
POOL = "masters"  # the work pool of the stack's worker


class Services(StrEnum):
    """What a stack consists of."""

    LIGHT = "light"
    FULL = "full"


@dataclass(frozen=True)
class Settings:
    """Each is read from MASTERS_NAME; the comment says what it is."""

    prefect_port: int = 4200
    mlflow_port: int = 5000
    s3_port: int = 8333  # of the full stack
    runs_at_once: int = 1  # runs of the pool at a time: the GPUs are one pool's
    lost_after: int = 90  # seconds without a heartbeat after which a run is lost; they come every 30
    resume_after: int = 15  # seconds after which a crashed run is scheduled again
    resumes: int = 3  # times that a run is scheduled again
    pools: tuple[str, ...] = ()  # further work pools, for single stages, separated by commas

    @classmethod
    def from_environment(cls) -> "Settings":
        """Raises InputError if a value is no whole number or outside its range, or a pool's name cannot be one."""
        usual = cls()
        whole = [f.name for f in fields(cls) if f.type is int]
        numbers = {name: _number(f"MASTERS_{name.upper()}", getattr(usual, name)) for name in whole}
        return cls(**numbers, pools=_pools("MASTERS_POOLS"))


def home() -> Path:
    """Where the stack keeps its state: databases, files, logs. MASTERS_HOME, else ~/.local/share/masters."""
    return Path(os.environ.get("MASTERS_HOME") or Path.home() / ".local/share/masters").absolute()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    low, high = PORTS if name.endswith("_PORT") else RANGES[name]
    if not re.fullmatch("[0-9]{1,9}", text):
        raise InputError(f"{name}: expected a whole number, found {text!r}")
    if not low <= int(text) <= high:
        raise InputError(f"{name}: expected a whole number from {low} to {high}, found {text}")
    return int(text)


def _pools(name: str) -> tuple[str, ...]:
    pools = tuple(dict.fromkeys(pool for part in os.environ.get(name, "").split(",") if (pool := part.strip())))
    for pool in pools:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", pool):
            raise InputError(f"{name}: expected names of letters, digits, - and _, found {pool!r:.100}")
        if pool == POOL:
            raise InputError(
                f"{name}: {POOL} is the pool of whole runs: a stage would wait for the run that asks for it"
            )
    return pools
