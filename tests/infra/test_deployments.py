"""`masters up` prepares a real Prefect server, and keeps changes that users made in the UI."""

import asyncio
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import Deployment, FlowRun, State, StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling, Crashed, Running

from masters.infra.deployments import POOL, deploy, prepare_server
from masters.infra.local_prefect import prefect_api
from masters.infra.settings import Settings

pytestmark = pytest.mark.slow
CONFIG = dict(
    name="left", store=dict(root="runs/left"), data=dict(source="easyvqa"), student=dict(model="demo/models/student"),
    teachers=[dict(model="demo/models/teacher")],
)  # fmt: skip
SETTINGS = Settings(resumes=1)


@pytest.fixture(scope="module")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_API_URL", raising=False)
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        with prefect_api() as api, temporary_settings({PREFECT_API_URL: api.url}):
            api.wait_until_ready()
            assert os.environ["PREFECT_API_URL"] == api.url
            asyncio.run(prepare_server(SETTINGS))
            assert deploy() == 0
            yield


async def nightly(client: PrefectClient) -> Deployment:
    return await client.read_deployment_by_name("nightly/nightly")  # pyright: ignore[reportReturnType]


def test_a_schedule_changed_in_the_ui_is_kept(_server: None, tmp_path: Path) -> None:
    config = dict(name="demo", store=dict(root=str(tmp_path)))

    async def changed() -> Deployment:
        async with get_client() as client:
            found = await nightly(client)
            [schedule] = found.schedules
            assert not schedule.active
            await client.update_deployment_schedule(
                found.id, schedule.id, active=True, schedule=CronSchedule(cron="30 3 * * 1", timezone="Asia/Tokyo")
            )
            body = dict(parameters=dict(config=config))
            answer = await client._client.patch(f"/deployments/{found.id}/schedules/{schedule.id}", json=body)
            answer.raise_for_status()
            return await nightly(client)

    async def now() -> Deployment:
        async with get_client() as client:
            return await nightly(client)

    before = asyncio.run(changed()).schedules[0]
    assert before.active and before.parameters == dict(config=config)
    assert deploy() == 0
    [after] = asyncio.run(now()).schedules
    assert (after.schedule, after.active, after.parameters, after.slug) == (
        before.schedule, True, dict(config=config), before.slug,
    )  # fmt: skip


def test_unchanged_automations_are_not_updated(_server: None) -> None:
    async def told() -> dict:
        async with get_client() as client:
            answer = await client._client.post("/automations/filter")
            return {found["name"]: (found["id"], found["updated"]) for found in answer.json()}

    before = asyncio.run(told())
    assert len(before) == 3
    asyncio.run(prepare_server(SETTINGS))
    assert asyncio.run(told()) == before
    asyncio.run(prepare_server(Settings(resumes=1, resume_after=20)))
    changed = {name for name, what in asyncio.run(told()).items() if what != before[name]}
    assert changed == {"masters: crashed runs go on"}
    asyncio.run(prepare_server(SETTINGS))


@pytest.mark.parametrize(
    ("states", "end"),
    [
        ([Running()], (StateType.SCHEDULED, "AwaitingRetry")),
        ([Running(), Cancelling()], (StateType.CANCELLED, "Cancelled")),
        ([Running(), Running()], (StateType.CRASHED, "Crashed")),
    ],
    ids=["goes on", "was to be cancelled", "began too often"],
)
def test_runs_of_a_previous_stack_are_ended(states: list[State], end: tuple[StateType, str], _server: None) -> None:
    """Runs go through `states`; each Running is another attempt, and SETTINGS allows one more."""

    async def left() -> FlowRun:
        async with get_client() as client:
            given = dict(config=CONFIG)
            run = await client.create_flow_run_from_deployment((await nightly(client)).id, parameters=given)
            for state in states:
                await client.set_flow_run_state(run.id, state, force=True)
            await prepare_server(SETTINGS)
            return await client.read_flow_run(run.id)

    run = asyncio.run(left())
    assert run.work_pool_name == POOL
    assert (run.state_type, run.state_name) == end


def test_a_crashed_run_is_resumed_up_to_the_limit(_server: None) -> None:
    """Prefect's automations resume the run while the stack runs; SETTINGS allows one more attempt."""

    async def ended() -> tuple[FlowRun, FlowRun]:
        await prepare_server(replace(SETTINGS, resume_after=10))
        async with get_client() as client:
            run = await client.create_flow_run_from_deployment(
                (await nightly(client)).id, parameters=dict(config=CONFIG)
            )

            async def crashes(wait: float) -> FlowRun:
                await client.set_flow_run_state(run.id, Running(), force=True)
                await client.set_flow_run_state(run.id, Crashed(), force=True)
                until = time.monotonic() + wait
                while (found := await client.read_flow_run(run.id)).state_type == StateType.CRASHED:
                    if time.monotonic() > until:
                        break
                    await asyncio.sleep(0.5)
                return found

            return await crashes(90), await crashes(30)

    once, twice = asyncio.run(ended())
    assert (once.state_name, once.run_count) == ("AwaitingRetry", 1)
    assert (twice.state_name, twice.run_count) == ("Crashed", 2)
