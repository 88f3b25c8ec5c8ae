"""Arguments and options that several commands share, and the setup that keeps libraries silent."""

import logging
import os
import warnings
from pathlib import Path
from typing import Annotated

import typer

from masters.common.redaction import redact_logs
from masters.config.stages import Stage

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML configuration, e.g. configs/demo.toml")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value, e.g. train.epochs=2")
]
Rebuild = Annotated[list[Stage] | None, typer.Option("--rebuild", help="Build a stage again, in every round")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout")]


def silence_libraries() -> None:
    """Keep library logs off the terminal, which shows our own progress. Call before Prefect and MLflow are imported."""
    redact_logs()
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    # `masters up` marks runs without heartbeats as crashed, and Prefect sends none by default
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")
    os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    warnings.filterwarnings("ignore")
    for name in ("mlflow", "alembic", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # logs each error of a database, such as a full disk, with its traceback and raises it too
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
