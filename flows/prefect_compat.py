"""Private parts of Prefect that this project uses, written for Prefect 3.8.8. Check them when the version changes."""

import os
import warnings
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun

if TYPE_CHECKING:
    from prefect.workers.process import ProcessWorker

VERSION = "3.8.8"

IsReported = Callable[[PrefectClient, FlowRun], Awaitable[bool]]


def worker_name() -> str:
    """Return the name of the worker that started this process; empty if no worker did."""
    return os.environ.get("PREFECT__WORKER_NAME", "")


def filter_crash_reports(is_reported: IsReported) -> "type[ProcessWorker]":
    """Return Prefect's process worker without crash reports for which `is_reported` is true.

    The class replaces Prefect's own worker of the type `process`.
    """
    from prefect.workers.process import ProcessWorker  # most flows do not need workers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Prefect warns that the class replaces another

        class Worker(ProcessWorker):
            async def _propose_crashed_state(
                self, flow_run: FlowRun, message: str, client: PrefectClient | None = None
            ) -> None:
                """Report that an attempt has crashed. `flow_run` is the run as it was when the attempt started."""
                if not await is_reported(client or self.client, flow_run):
                    await super()._propose_crashed_state(flow_run, message, client)

    return Worker
