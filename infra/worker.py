"""`python -m masters.infra.worker worker start ...`: Prefect's command line, with a worker that tells of a crash once.

Prefect's own tells twice: when the process has ended, and again when the flow's hooks have run, in a process that
imports the flow. On a busy machine that takes longer than the run waits to go on, and the second report, of an attempt
that is over, would crash the next one: which then runs, and is scheduled again, so that two run at once.
"""

import warnings

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.workers.process import ProcessWorker

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # that it takes the place of the other, which it is meant to

    class Worker(ProcessWorker):
        """Prefect's process worker, under the same name: `--type process`."""

        async def _propose_crashed_state(
            self, flow_run: FlowRun, message: str, client: PrefectClient | None = None
        ) -> None:
            """Say that this attempt has crashed, unless that is known. `flow_run`: as it was when it was taken up."""
            if not await _crash_is_known(client or self.client, flow_run):
                await super()._propose_crashed_state(flow_run, message, client)


async def _crash_is_known(client: PrefectClient, flow_run: FlowRun) -> bool:
    """Whether the server has heard of a crash since this attempt was taken up; not where it does not answer."""
    try:
        states = await client.read_flow_run_states(flow_run.id)
    except Exception:  # of whatever kind: it would end the worker
        return False
    taken = flow_run.state.timestamp if flow_run.state else None
    crashes = [state.timestamp for state in states if state.type == StateType.CRASHED]
    return any(taken is None or crashed >= taken for crashed in crashes)


if __name__ == "__main__":
    from prefect.cli import app

    app()
