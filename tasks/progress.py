"""A stage's progress: one object feeds the terminal's bar and a progress artifact in Prefect's UI.

The artifact is sent from a thread of its own, the latest state at most every `SECONDS`: neither a flow of many shards
nor a server that is away slows a stage down, and no update that fails fails it.

Lines of the log go to the log tab of Prefect's UI. Outside of a flow they go nowhere: the terminal has its own.
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

SECONDS = 2.0
LAST_SECONDS = 5.0  # a stage waits this long at its end for its last state to be sent

CONSOLE = Console(stderr=True, markup=False)  # names may hold brackets


def key(run: str, what: str) -> str:
    """An artifact's key in Prefect: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", f"{run}-{what}".lower()).strip("-")


class Progress:
    """Use as a context manager around a stage's work; `update` is cheap and may be called at any rate."""

    def __init__(self, console: Console, run: str, stage: str, unit: str) -> None:
        columns = (TextColumn(f"{stage:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Bar(*columns, TextColumn("{task.description}"), console=console, transient=True)
        self._shown = self._bar.add_task(unit, total=None)
        self._unit, self._key = unit, key(run, stage)
        self._latest: tuple[float, str] | None = None
        self._changed, self._ended = threading.Event(), threading.Event()
        self._sender: threading.Thread | None = None

    def __enter__(self) -> "Progress":
        self._bar.start()
        if TaskRunContext.get():  # outside of a task there is no page to show it on
            send = contextvars.copy_context().run
            self._sender = threading.Thread(target=send, args=(self._send,), daemon=True)
            self._sender.start()
        return self

    def update(self, done: int, total: int, note: str = "") -> None:
        """`done` of `total` of the stage's unit; `note`: what else there is to say about it now."""
        self._bar.update(self._shown, completed=done, total=total, description=note or self._unit)
        said = f"{done:,} of {total:,} {self._unit}" + (f", {note}" if note else "")
        self._latest = (100.0 * done / total if total else 100.0, said)
        self._changed.set()

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._bar.stop()
        self._ended.set()
        self._changed.set()
        if self._sender and (kind is None or issubclass(kind, Exception)):  # who cancels does not wait
            self._sender.join(LAST_SECONDS)

    def _send(self) -> None:
        artifact: UUID | None = None
        sent, warned = None, False
        while not self._ended.is_set() or sent != self._latest:
            self._changed.wait()
            self._changed.clear()
            latest, last = self._latest, self._ended.is_set()
            try:
                if latest and latest != sent:
                    artifact = _sent(artifact, self._key, *latest)
                sent = latest
            except Exception as error:  # whatever the server or the way to it does
                if not warned:
                    log("warning", f"progress cannot be shown for now: {type(error).__name__}: {error}")
                warned, sent = True, latest if last else sent
            self._ended.wait(SECONDS)


def _sent(artifact: UUID | None, name: str, percent: float, said: str) -> UUID:
    if artifact is None:
        return cast(UUID, create_progress_artifact(percent, key=name, description=said))
    update_progress_artifact(artifact, progress=percent, description=said)
    return artifact


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
