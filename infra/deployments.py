"""`python -m masters.infra.deployments`: what the Prefect server must hold before a worker starts.

The work pools, the deployments of prefect.yaml and of single stages, and three automations for lost runs: one that has
stopped to send heartbeats is marked Crashed, one that was being cancelled meanwhile is Cancelled, and a crashed run of
a deployment is scheduled again, a set number of times. Scheduling waits for RESUME_AFTER: workers but for the stack's
own (infra/worker.py) propose Crashed twice, seconds apart, and resuming at the first would run it twice.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter, WorkPoolFilter
from prefect.client.schemas.objects import DeploymentSchedule, StateType
from prefect.events.actions import ActionTypes, ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.states import AwaitingRetry, Cancelled, Crashed
from prefect.types.entrypoint import EntrypointType
from prefect.workers.process import ProcessWorker

import masters
from masters.infra.settings import POOL, Settings

RUN = "prefect.flow-run."
ENDED = {f"{RUN}{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
GOES_ON = {f"{RUN}{state}" for state in ("Scheduled", "AwaitingRetry", "Late", "Pending", "Running", "Cancelling")}
LIVES = ("heartbeat", "AwaitingRetry", "Cancelling")  # or somebody has it in hand
STAGE_FLOW = "stage"
OWNERS = ("command", "env", "working_dir")  # of a run's job: what the machine's owner decides
DEFINITIONS = Path(masters.__file__).parent / "prefect.yaml"


async def prepare(settings: Settings) -> None:
    """Pool, automations, and an end to what a previous stack left running."""
    async with get_client() as client:
        for name in (POOL, *settings.pools):
            await _pool(client, name, settings)
        for automation in (lost(settings), cancelled(settings), resumed(settings)):
            await _replace(client, automation)
        await _end_lost(client, settings)


def deploy() -> int:
    """Every deployment of prefect.yaml; its runs start in the present folder. Returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / DEFINITIONS.name
        file.touch(mode=0o600)  # parameters of a schedule may concern nobody else
        file.write_text(yaml.safe_dump(asyncio.run(definitions())))
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
        return subprocess.run(command).returncode


async def definitions() -> dict:
    """prefect.yaml, where a deployment is there already with the schedules, parameters and pause that it has.

    Those are whoever uses the UI's. They go into the request that updates a deployment, which would end them otherwise.
    """
    defined = yaml.safe_load(DEFINITIONS.read_text())
    named = dict(name=dict(any_=[deployment["name"] for deployment in defined["deployments"]]))
    async with get_client() as client:
        found = await client.read_deployments(deployment_filter=DeploymentFilter.model_validate(named))
    there = {deployment.name: deployment for deployment in found}
    for deployment in defined["deployments"]:
        if kept := there.get(deployment["name"]):
            deployment["schedules"] = [_scheduled(schedule) for schedule in kept.schedules]
            deployment |= dict(parameters=kept.parameters, paused=kept.paused)
    return defined


def _scheduled(found: DeploymentSchedule) -> dict:
    """A schedule of the server as prefect.yaml would say it."""
    told = found.schedule.model_dump(mode="json", exclude_none=True)
    if "rrule" in told:
        told = dict(rrule=json.dumps(told))
    told |= dict(active=found.active, parameters=found.parameters, slug=found.slug)
    return {name: value for name, value in told.items() if value is not None}


async def deploy_stages(settings: Settings) -> None:
    """For each further pool the deployment `stage/POOL`, which runs one stage of somebody's run.

    Unlike those of prefect.yaml it names no folder to start in: its workers may be on other machines.
    """
    if not settings.pools:
        return
    from masters.flows.pool_stage import stage  # seconds of imports that no other deployment needs

    for pool in settings.pools:
        deployment = await stage.ato_deployment(
            pool, description="One stage, handed on by a run that waits for it", tags=["masters"], work_pool_name=pool,
            job_variables={"stream_output": False}, entrypoint_type=EntrypointType.MODULE_PATH,
        )  # fmt: skip
        await deployment.aapply()


def lost(settings: Settings) -> AutomationCore:
    """A run that sent a heartbeat and then neither another nor an end."""
    return AutomationCore(
        name="masters: lost runs are crashed",
        description="A run whose process or machine is gone sends no heartbeat and would stay Running for ever.",
        trigger=_missed(f"{RUN}heartbeat", {f"{RUN}{still}" for still in LIVES} | ENDED, settings),
        actions=_become(StateType.CRASHED, f"no heartbeat for {settings.lost_after} seconds"),
    )


def cancelled(settings: Settings) -> AutomationCore:
    """A run that was to be cancelled and whose process is gone: nobody wants it to go on, so it is not crashed."""
    return AutomationCore(
        name="masters: lost cancellations are done",
        description="A run that is being cancelled and whose worker is gone would stay Cancelling for ever.",
        trigger=_missed(f"{RUN}Cancelling", ENDED, settings),
        actions=_become(StateType.CANCELLED, "its process did not end within this time"),
    )


def _missed(after: str, expect: set[str], settings: Settings) -> EventTrigger:
    """A run of which none of the expected comes within `lost_after`."""
    return EventTrigger(
        match={"prefect.resource.id": f"{RUN}*"},
        for_each={"prefect.resource.id"},
        after={after},
        expect=expect,
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=settings.lost_after),
    )


def resumed(settings: Settings) -> AutomationCore:
    """A crashed run of a deployment that nothing has scheduled since, if it began at most `resumes` times."""
    return AutomationCore(
        name="masters: crashed runs go on",
        description=f"At most {settings.resumes} times; what is built already is reused.",
        enabled=settings.resumes > 0,
        trigger=EventTrigger(
            match={
                "prefect.resource.id": f"{RUN}*",
                "prefect.run-count": [str(count) for count in range(1, settings.resumes + 1)] or ["none"],
            },
            match_related=[
                {"prefect.resource.role": "deployment"},
                # a stage on another pool is asked for again by the run that waits for it
                {"prefect.resource.role": "flow", "prefect.resource.name": f"!{STAGE_FLOW}"},
            ],
            for_each={"prefect.resource.id"},
            after={f"{RUN}Crashed"},
            expect=GOES_ON,
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=settings.resume_after),
        ),
        actions=_become(StateType.SCHEDULED, "goes on after a crash", "AwaitingRetry"),
    )


def _become(state: StateType, message: str, name: str | None = None) -> list[ActionTypes]:
    return [ChangeFlowRunState(state=state, message=message, name=name, force=False)]


async def _pool(client: PrefectClient, name: str, settings: Settings) -> None:
    try:
        await client.read_work_pool(name)
    except ObjectNotFound:
        await client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=job_template()))
    changes: dict[str, Any] = dict(concurrency_limit=settings.runs_at_once, base_job_template=job_template())
    await client.update_work_pool(name, WorkPoolUpdate(**changes))


def job_template() -> dict:
    """Of the pool's runs: whoever starts one chooses its parameters, not its command, environment or folder.

    The environment holds what bounds parameters (MASTERS_ALLOWED_*), so a form must not reach it.
    """
    template = ProcessWorker.get_default_base_job_template()
    for name in OWNERS:
        template["job_configuration"].pop(name, None)
        template["variables"]["properties"].pop(name, None)
    return template


async def _end_lost(client: PrefectClient, settings: Settings) -> None:
    """Runs of the pool that look alive before its worker was started: their processes went with the last one.

    They are scheduled again at once, as the automation would: it may not have heard of a Crashed that came so early.
    """
    alive = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    runs = await client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate(dict(state=dict(type=dict(any_=alive)))),
        work_pool_filter=WorkPoolFilter.model_validate(dict(name=dict(any_=[POOL]))),
    )
    for run in runs:
        cancelling = run.state_type == StateType.CANCELLING
        state = Cancelled() if cancelling else Crashed(message="its process ended with the stack")
        await client.set_flow_run_state(run.id, state, force=True)
        if not cancelling and run.deployment_id and run.run_count <= settings.resumes:
            again = AwaitingRetry(message="goes on: its process ended with the stack")
            await client.set_flow_run_state(run.id, again, force=True)


async def _replace(client: PrefectClient, automation: AutomationCore) -> None:
    """The one of this name, as it is written here. One that is so already stays: written anew it forgets its runs."""
    found = await client.read_automations_by_name(automation.name)
    for extra in found[1:]:
        await client.delete_automation(extra.id)
    if not found:
        await client.create_automation(automation)
    elif AutomationCore.model_validate(found[0].model_dump(include=set(AutomationCore.model_fields))) != automation:
        await client.update_automation(found[0].id, automation)


if __name__ == "__main__":
    chosen = Settings.from_environment()
    asyncio.run(prepare(chosen))
    asyncio.run(deploy_stages(chosen))
    sys.exit(deploy())
