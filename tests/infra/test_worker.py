"""The stack's worker reports a crash to a real server once; a later report would concern an ended attempt."""

import asyncio

import pytest
from prefect import flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import AwaitingRetry, Crashed, Pending, Running
from prefect.utilities.dispatch import lookup_type
from prefect.workers.base import BaseWorker

from masters.infra.worker import Worker

pytestmark = pytest.mark.slow


@flow
def nothing() -> None:
    pass


async def attempt(client: PrefectClient, run: FlowRun, *states: State) -> FlowRun:
    """Return a run as a worker takes it, which then goes through these states."""
    await client.set_flow_run_state(run.id, AwaitingRetry(), force=True)
    taken = await client.read_flow_run(run.id)
    for state in states:
        await client.set_flow_run_state(run.id, state, force=True)
    return taken


def test_the_second_report_of_a_crash_does_not_affect_the_next_attempt(prefect: dict[str, str]) -> None:
    async def told() -> list[StateType | None]:
        async with get_client() as client:
            run, worker, found = await client.create_flow_run(nothing), Worker("masters"), []
            for states in ([Pending(), Running()], [Pending(), Running(), Crashed()], [Pending(), Running()]):
                taken = await attempt(client, run, *states)
                if states[-1].is_crashed():
                    await attempt(client, run, Pending())  # goes on before the worker has said all
                await worker._propose_crashed_state(taken, "it exited with -9", client)
                found.append((await client.read_flow_run(run.id)).state_type)
            return found

    with temporary_settings({PREFECT_API_URL: prefect["PREFECT_API_URL"]}):
        assert asyncio.run(told()) == [StateType.CRASHED, StateType.PENDING, StateType.CRASHED]


def test_a_crash_is_reported_when_the_server_does_not_answer(prefect: dict[str, str]) -> None:
    async def told() -> StateType | None:
        async with get_client() as client:
            taken = await attempt(client, await client.create_flow_run(nothing), Running(), Crashed(), Running())

            async def fails(_: object) -> list[State]:
                raise ConnectionError

            client.read_flow_run_states = fails  # pyright: ignore[reportAttributeAccessIssue]
            await Worker("masters")._propose_crashed_state(taken, "it exited with -9", client)
            return (await client.read_flow_run(taken.id)).state_type

    with temporary_settings({PREFECT_API_URL: prefect["PREFECT_API_URL"]}):
        assert asyncio.run(told()) == StateType.CRASHED


def test_process_pools_use_this_worker() -> None:
    assert lookup_type(BaseWorker, "process") is Worker
