"""`masters up` prepares a real Prefect server, and keeps changes that users made in the UI."""

import asyncio
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID

import pytest
from prefect.client.orchestration import PrefectClient, SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import Deployment, FlowRun, State, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.client.schemas.schedules import CronSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import AwaitingRetry, Cancelling, Crashed, Pending, Running

from masters.flows import missed_nights
from masters.infra.deployments import POOL, deploy, prepare_server
from masters.infra.local_prefect import prefect_api
from masters.infra.ports import free_ports
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


def test_one_night_runs_at_a_time(_server: None) -> None:
    """Another one waits for its end, and is not cancelled, as it may be a night of another configuration."""
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("nightly/nightly")
        assert deployment.global_concurrency_limit and deployment.global_concurrency_limit.limit == 1
        first, second = (
            client.create_flow_run_from_deployment(deployment.id, parameters=dict(config=CONFIG)) for _ in range(2)
        )
        client.set_flow_run_state(first.id, Pending())
        client.set_flow_run_state(second.id, Pending())
        assert client.read_flow_run(first.id).state_name == "Pending"
        assert client.read_flow_run(second.id).state_name == "AwaitingConcurrencySlot"
        client.set_flow_run_state(first.id, Crashed(), force=True)  # gives its place back
        client.set_flow_run_state(second.id, Pending())
        assert client.read_flow_run(second.id).state_name == "Pending"
        client.set_flow_run_state(second.id, Crashed(), force=True)


def scheduled_nights(client: SyncPrefectClient, name: str) -> list[FlowRun]:
    """Return the nights that the schedule of this name has planned, the earliest first."""
    planned = FlowRunFilter.model_validate(dict(state=dict(type=dict(any_=[StateType.SCHEDULED]))))
    runs = client.read_flow_runs(flow_run_filter=planned, sort=FlowRunSort.EXPECTED_START_TIME_ASC)
    return [run for run in runs if run.auto_scheduled and run.parameters["config"]["name"] == name]


def is_due(run: FlowRun) -> bool:
    return run.expected_start_time is not None and run.expected_start_time < datetime.now(UTC)


def test_missed_nights_collapse_into_one(_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nights of two schedules, which are due every three seconds, and one that a person requested."""
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("nightly/nightly")
        for name in ("one", "two"):
            given = dict(config=CONFIG | dict(name=name))
            schedule = dict(schedule=dict(interval=3.0), active=True, parameters=given)
            client._client.post(f"/deployments/{deployment.id}/schedules", json=[schedule]).raise_for_status()
        until = time.monotonic() + 120
        while min(sum(map(is_due, scheduled_nights(client, name))) for name in ("one", "two")) < 3:
            assert time.monotonic() < until
            time.sleep(0.5)
        night, *others = scheduled_nights(client, "one")
        requested = client.create_flow_run_from_deployment(deployment.id, parameters=night.parameters)
        monkeypatch.setattr(missed_nights, "deployment", SimpleNamespace(id=deployment.id))
        monkeypatch.setattr(missed_nights, "flow_run", SimpleNamespace(id=night.id))
        client.set_flow_run_state(night.id, Running(), force=True)
        due = [run.id for run in others if is_due(run)]
        missed_nights.cancel_missed_nights()
        later = [run.id for run in others if not is_due(run)]
        assert len(due) >= 2 and len(later) > 5
        another = scheduled_nights(client, "two")[0]
        states = {id: client.read_flow_run(id).state for id in [*due, *later[:3], requested.id, another.id, night.id]}
        assert all(states[id].type == StateType.CANCELLED and night.name in states[id].message for id in due)
        assert {states[id].type for id in [*later[:3], requested.id, another.id]} == {StateType.SCHEDULED}
        assert is_due(another) and states[night.id].type == StateType.RUNNING


def test_a_night_that_was_interrupted_is_not_a_missed_one(_server: None) -> None:
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("nightly/nightly")
        given = dict(config=CONFIG | dict(name="interrupted"))
        schedule = dict(schedule=dict(interval=3.0), active=True, parameters=given)
        client._client.post(f"/deployments/{deployment.id}/schedules", json=[schedule]).raise_for_status()
        until = time.monotonic() + 120
        while sum(map(is_due, scheduled_nights(client, "interrupted"))) < 3:
            assert time.monotonic() < until
            time.sleep(0.5)
        night, interrupted, missed, *_ = scheduled_nights(client, "interrupted")
        client.set_flow_run_state(interrupted.id, AwaitingRetry(), force=True)
        found = [run.id for run in missed_nights.find_missed_nights(client, night)]
        assert missed.id in found and interrupted.id not in found


def test_only_missed_nights_that_the_server_cancels_are_counted(_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    set_state = SyncPrefectClient.set_flow_run_state

    def refuse_one(client: SyncPrefectClient, id: UUID, state: State) -> object:
        return SimpleNamespace(status=SetStateStatus.REJECT) if id == refused.id else set_state(client, id, state)

    monkeypatch.setattr(missed_nights, "log", lambda level, line: lines.append(line))
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("nightly/nightly")
        given = dict(config=CONFIG | dict(name="counted"))
        night, missed, refused = (
            client.create_flow_run_from_deployment(deployment.id, parameters=given) for _ in range(3)
        )
        monkeypatch.setattr(missed_nights, "deployment", SimpleNamespace(id=deployment.id))
        monkeypatch.setattr(missed_nights, "flow_run", SimpleNamespace(id=night.id))
        monkeypatch.setattr(missed_nights, "find_missed_nights", lambda *_: [missed, refused])
        monkeypatch.setattr(SyncPrefectClient, "set_flow_run_state", refuse_one)
        missed_nights.cancel_missed_nights()
    assert lines == ["missed nights that are cancelled, as this night does their work: 1"]


def test_an_error_of_the_server_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("Server error '503'\nFor more information check:\nthe log")

    lines: list[str] = []
    monkeypatch.setattr(missed_nights, "log", lambda level, line: lines.append(line))
    monkeypatch.setattr(missed_nights, "deployment", SimpleNamespace(id="a deployment's"))
    monkeypatch.setattr(missed_nights, "get_client", fail)
    missed_nights.cancel_missed_nights()
    [line] = lines
    assert line.startswith("missed nights may run after this one: ") and len(line.splitlines()) == 1


def test_a_night_goes_on_if_the_missed_ones_cannot_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(missed_nights, "deployment", SimpleNamespace(id="a deployment's"))
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_ports(1)[0]}/api"}):
        missed_nights.cancel_missed_nights()
