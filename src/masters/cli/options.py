"""Arguments and options that several commands share, and silence for libraries.

Progress and results are printed by us; libraries' logs go to their servers and log files.
"""

import logging
import os
import warnings
from pathlib import Path
from typing import Annotated

import typer

from masters.common.redaction import redact_logs
from masters.config.stages import Stage

ConfigPath = Annotated[Path, typer.Argument(help="A TOML configuration, e.g. configs/demo.toml")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value, e.g. train.epochs=2")
]
Rebuild = Annotated[list[Stage] | None, typer.Option("--rebuild", help="Build a stage again, in every round")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout")]


def silence_libraries() -> None:
    """Call before Prefect and MLflow are imported."""
    redact_logs()
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")  # a stack takes a run without them for lost
    os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    warnings.filterwarnings("ignore")
    for name in ("mlflow", "alembic", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
