"""Cancels nights that the schedule missed, while the stack was down or an earlier night ran on: one is enough."""

from datetime import UTC, datetime

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelled

from masters.common.errors import one_line
from masters.tasks.progress import log

INTERRUPTED = "AwaitingRetry"  # name of the state of a night that goes on after a crash or a stop of the stack


def cancel_missed_nights() -> None:
    """Cancel the nights that are due too and have the parameters of this one: its data already include theirs.

    Does nothing outside a deployment. Errors are only logged, as a night too many does no harm.
    """
    if not deployment.id:
        return
    try:
        with get_client(sync_client=True) as client:
            night = client.read_flow_run(flow_run.id)
            cancelled = 0
            for run in find_missed_nights(client, night):
                message = f"missed, and done by the night {night.name} of {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
                result = client.set_flow_run_state(run.id, Cancelled(message=message))
                cancelled += result.status == SetStateStatus.ACCEPT  # not one that has started or ended meanwhile
    except Exception as error:  # the client raises many types of errors
        log("warning", f"missed nights may run after this one: {type(error).__name__}: {one_line(error)}")
        return
    if cancelled:
        log("info", f"missed nights that are cancelled, as this night does their work: {cancelled}")


def find_missed_nights(client: SyncPrefectClient, night: FlowRun) -> list[FlowRun]:
    """Return the scheduled runs of a night's deployment that are due and have the same parameters.

    Runs that a person requested are not among them, nor those that were interrupted and go on.
    """
    is_due = dict(
        deployment_id=dict(any_=[night.deployment_id]),
        state=dict(type=dict(any_=[StateType.SCHEDULED])),
        expected_start_time=dict(before_=datetime.now(UTC)),
    )
    due = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(is_due))
    planned = [run for run in due if run.auto_scheduled and run.state_name != INTERRUPTED]
    return [run for run in planned if run.parameters == night.parameters and run.id != night.id]
