"""Show the progress of a stage, as a bar on the terminal and as a progress artifact in Prefect's UI.

A background thread sends the artifact's latest state at most every `UPDATE_SECONDS`, so a flow of many shards or an
unreachable server does not slow a stage down. Failed updates are only logged.

Log lines go to the log tab of Prefect's UI. Outside of a flow they are dropped: the terminal has its own lines.
"""

import contextvars
import re
import threading
from types import TracebackType
from typing import Literal, cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

UPDATE_SECONDS = 2.0
LAST_UPDATE_SECONDS = 5.0  # how long a stage waits at its end until its last state is sent

CONSOLE = Console(stderr=True, markup=False)  # names may hold brackets


def artifact_key(run: str, name: str) -> str:
    """Return the key of a Prefect artifact: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", f"{run}-{name}".lower()).strip("-")


class Progress:
    """Context manager around a stage's work. `update` is cheap and may be called at any rate."""

    def __init__(self, console: Console, run: str, stage: str, unit: str) -> None:
        columns = (TextColumn(f"{stage:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Bar(*columns, TextColumn("{task.description}"), console=console, transient=True)
        self._bar_task = self._bar.add_task(unit, total=None)
        self._unit, self._key = unit, artifact_key(run, stage)
        self._latest: tuple[float, str] | None = None  # percent and description
        self._changed, self._ended = threading.Event(), threading.Event()
        self._sender: threading.Thread | None = None

    def __enter__(self) -> "Progress":
        self._bar.start()
        if TaskRunContext.get():  # outside of a task no page shows it
            run_in_context = contextvars.copy_context().run
            self._sender = threading.Thread(target=run_in_context, args=(self._send_updates,), daemon=True)
            self._sender.start()
        return self

    def update(self, done: int, total: int, note: str = "") -> None:
        """Report `done` of `total` units. `note` is shown beside them."""
        self._bar.update(self._bar_task, completed=done, total=total, description=note or self._unit)
        description = f"{done:,} of {total:,} {self._unit}" + (f", {note}" if note else "")
        self._latest = (100.0 * done / total if total else 100.0, description)
        self._changed.set()

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._bar.stop()
        self._ended.set()
        self._changed.set()
        if self._sender and (kind is None or issubclass(kind, Exception)):  # a cancelled run does not wait
            self._sender.join(LAST_UPDATE_SECONDS)

    def _send_updates(self) -> None:
        artifact: UUID | None = None
        sent, has_warned = None, False
        while not self._ended.is_set() or sent != self._latest:
            self._changed.wait()
            self._changed.clear()
            latest, is_last = self._latest, self._ended.is_set()
            try:
                if latest and latest != sent:
                    artifact = _send(artifact, self._key, *latest)
                sent = latest
            except Exception as error:  # whatever the server or the connection raises
                if not has_warned:
                    log("warning", f"progress cannot be shown for now: {type(error).__name__}: {error}")
                has_warned, sent = True, latest if is_last else sent
            self._ended.wait(UPDATE_SECONDS)


def _send(artifact: UUID | None, key: str, percent: float, description: str) -> UUID:
    """Create the progress artifact, or update it. Returns its id."""
    if artifact is None:
        return cast(UUID, create_progress_artifact(percent, key=key, description=description))
    update_progress_artifact(artifact, progress=percent, description=description)
    return artifact


def log(level: Literal["info", "warning"], line: str) -> None:
    """Log a line in Prefect's UI, if a flow runs."""
    try:
        logger = get_run_logger()
    except MissingContextError:
        return
    getattr(logger, level)(line)


def warn(line: str) -> None:
    """Show a warning on the terminal and in the log of Prefect's UI."""
    log("warning", line)
    CONSOLE.print(f"warning: {line}", style="yellow", highlight=False, markup=False)
