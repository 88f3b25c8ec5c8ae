"""What every flow's attempt does around its own work: what an earlier one left in Prefect, patience, plain errors."""

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

from masters.common.errors import MastersError, Unreachable
from masters.common.redaction import redact_logs
from masters.tasks.progress import log

PAGE = 200  # task runs a request, as many as Prefect gives
RETRY_SECONDS = 300.0  # seconds
T = TypeVar("T")


@contextmanager
def flow_attempt() -> Iterator[None]:
    """A flow's body. Whatever it raises that is not meant for people becomes one line without secrets."""
    redact_logs()
    end_stale_tasks()
    try:
        yield
    except (MastersError, PrefectException):
        raise
    except Exception as error:
        raise MastersError(f"unexpected {type(error).__name__}: {' '.join(str(error).split())}") from error


def retry_unreachable(what: Callable[[], T]) -> T:
    """What `what` gives. In a deployment, where nobody looks on, a store or server that is away is waited for."""
    if not deployment.id:
        return what()
    trying = Retrying(
        retry=retry_if_exception_type(Unreachable), stop=stop_after_delay(RETRY_SECONDS), reraise=True,
        wait=wait_exponential(max=30), before_sleep=_log_retry,
    )  # fmt: skip
    return trying(what)


def _log_retry(state: RetryCallState) -> None:
    assert state.outcome  # it has failed
    log("warning", f"{state.outcome.exception()}")


def end_stale_tasks() -> None:
    """Task runs of this flow run's earlier attempts that look alive become Crashed.

    A killed process tells nobody of its tasks. Called before the attempt's own first task, whatever is alive is stale.
    What goes wrong is said and fails nothing: it concerns a page and no result.
    """
    if not flow_run.id or flow_run.run_count < 2:
        return
    try:
        _end(flow_run.id)
    except Exception as error:  # the server's client raises many kinds
        log("warning", f"task runs of the attempt before may still look alive: {type(error).__name__}: {error}")


def _end(run: str) -> None:
    alive = [StateType.RUNNING, StateType.PENDING]
    of_run = FlowRunFilter.model_validate(dict(id=dict(any_=[run])))
    looking = TaskRunFilter.model_validate(dict(state=dict(type=dict(any_=alive))))
    with get_client(sync_client=True) as client:
        for task in client.read_task_runs(flow_run_filter=of_run, task_run_filter=looking, limit=PAGE):
            state = Crashed(message="its attempt was cut short; the next one goes on")
            client.set_task_run_state(task.id, state, force=True)
