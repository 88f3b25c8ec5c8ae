"""Progress and results are printed by us; libraries' logs go to their servers and log files."""

import logging
import os
import warnings

from masters.secrets import mask_logs


def quiet() -> None:
    """Call before Prefect and MLflow are imported."""
    mask_logs()
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")  # a stack takes a run without them for lost
    os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    warnings.filterwarnings("ignore")
    for name in ("mlflow", "alembic", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
