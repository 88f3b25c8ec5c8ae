"""What an attempt that was cut short leaves behind in Prefect, put right by the attempt that goes on with the run."""

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import StateType
from prefect.runtime import flow_run
from prefect.states import Crashed

from masters.tasks.log import log

PAGE = 200  # task runs a request, as many as Prefect gives


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
