"""Clean up after earlier attempts, wait for servers and simplify errors: what every flow needs around its own work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import StateType
from prefect.exceptions import PrefectException
from prefect.runtime import deployment, flow_run
from prefect.states import Crashed
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from masters.common import disk_space
from masters.common.errors import MastersError, StoreError, TrackingError, Unreachable, one_line
from masters.common.redaction import redact_logs
from masters.tasks.progress import log

PAGE_SIZE = 200  # task runs per request, the most that Prefect returns
RETRY_SECONDS = 300.0
T = TypeVar("T")


@contextmanager
def flow_attempt() -> Iterator[None]:
    """Wrap the body of a flow. An unexpected error becomes a MastersError of one line without secrets."""
    redact_logs()
    end_stale_tasks()
    try:
        yield
    except (MastersError, PrefectException):
        raise
    except Exception as error:
        raise_if_interrupted(error)
        if disk_space.is_full(error):
            raise StoreError(" ".join(str(error).split())) from error
        raise MastersError(f"unexpected {type(error).__name__}: {' '.join(str(error).split())}") from error


def raise_if_interrupted(error: Exception) -> None:
    """Raise KeyboardInterrupt if an error comes of one: Prefect fails if Ctrl-C comes before a task has its run."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        cause = cause.__cause__ or cause.__context__


def retry_unreachable(function: Callable[[], T]) -> T:
    """Return the result of `function`. In a deployment, retry it while a store or server is unreachable or breaks off.

    Outside a deployment a person is watching and gets the error at once.
    """
    if not deployment.id:
        return function()
    retrying = Retrying(
        retry=retry_if_exception_type((Unreachable, TrackingError)),
        stop=stop_after_delay(RETRY_SECONDS),
        wait=wait_exponential(max=30),
        before_sleep=_log_retry,
        reraise=True,
    )
    return retrying(function)


def _log_retry(state: RetryCallState) -> None:
    assert state.outcome  # the function has failed
    log("warning", f"{state.outcome.exception()}")


def end_stale_tasks() -> None:
    """Mark task runs of earlier attempts that still look alive as Crashed: a killed process cannot do so itself.

    Must be called before the attempt starts a task of its own. Errors are only logged, because stale task runs affect
    nothing but the display.
    """
    if not flow_run.id or flow_run.run_count < 2:
        return
    try:
        _crash_task_runs(flow_run.id)
    except Exception as error:  # the client raises many types of errors
        reason = f"{type(error).__name__}: {one_line(error)}"
        log("warning", f"task runs of the previous attempt may still look alive: {reason}")


def _crash_task_runs(flow_run_id: str) -> None:
    alive = [StateType.RUNNING, StateType.PENDING]
    in_flow_run = FlowRunFilter.model_validate(dict(id=dict(any_=[flow_run_id])))
    is_alive = TaskRunFilter.model_validate(dict(state=dict(type=dict(any_=alive))))
    with get_client(sync_client=True) as client:
        for task_run in client.read_task_runs(flow_run_filter=in_flow_run, task_run_filter=is_alive, limit=PAGE_SIZE):
            state = Crashed(message="its attempt was interrupted; the next attempt continues")
            client.set_task_run_state(task_run.id, state, force=True)
