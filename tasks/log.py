"""Lines for the log tab of Prefect's UI. Outside of a flow they go nowhere: the terminal has its own."""

from typing import Literal

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger


def log(level: Literal["info", "warning"], line: str) -> None:
    try:
        logger = get_run_logger()
    except MissingContextError:
        return
    getattr(logger, level)(line)
