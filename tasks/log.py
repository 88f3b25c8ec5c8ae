"""Lines for the log tab of Prefect's UI. Outside of a flow they go nowhere: the terminal has its own."""

from typing import Literal

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from rich.console import Console

CONSOLE = Console(stderr=True, markup=False)  # names may hold brackets


def log(level: Literal["info", "warning"], line: str) -> None:
    try:
        logger = get_run_logger()
    except MissingContextError:
        return
    getattr(logger, level)(line)


def warn(line: str) -> None:
    """On the terminal and in the log of Prefect's UI."""
    log("warning", line)
    CONSOLE.print(f"warning: {line}", style="yellow", highlight=False, markup=False)
