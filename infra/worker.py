"""`python -m masters.infra.worker worker start ...`: Prefect's command line with a worker that reports a crash once.

Prefect's own worker reports a crash twice: when the process has ended, and again after the flow's hooks have run, in
a process that has to import the flow. On a busy machine that takes longer than the pause before the next attempt. The
second report would then crash that attempt although it keeps running, and Prefect would start another one beside it.
"""

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, StateType

from masters.flows.prefect_compat import filter_crash_reports


async def is_crash_reported(client: PrefectClient, flow_run: FlowRun) -> bool:
    """Return whether the server knows of a crash since this attempt started; False if the server does not answer."""
    try:
        states = await client.read_flow_run_states(flow_run.id)
    except Exception:  # an error of any type would end the worker
        return False
    started = flow_run.state.timestamp if flow_run.state else None
    crashes = [state.timestamp for state in states if state.type == StateType.CRASHED]
    return any(started is None or crashed >= started for crashed in crashes)


Worker = filter_crash_reports(is_crash_reported)

if __name__ == "__main__":
    from prefect.cli import app

    app()
