"""`python -m masters.infra.deployments`: prepares the Prefect server before a worker starts.

Creates the work pools, the deployments of prefect.yaml and of single stages, and three automations for lost runs: a run
without heartbeats becomes Crashed, one that was being cancelled becomes Cancelled, and a crashed run of a deployment is
scheduled again, up to MASTERS_RESUMES times. Scheduling waits for RESUME_AFTER: workers but for the stack's
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

EVENT = "prefect.flow-run."
END_EVENTS = {f"{EVENT}{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
CONTINUATION_EVENTS = {
    f"{EVENT}{state}" for state in ("Scheduled", "AwaitingRetry", "Late", "Pending", "Running", "Cancelling")
}
ALIVE_EVENTS = ("heartbeat", "AwaitingRetry", "Cancelling")
STAGE_FLOW = "stage"
OWNER_SETTINGS = ("command", "env", "working_dir")  # parts of a run's job that only the machine's owner sets
DEFINITIONS = Path(masters.__file__).parent / "prefect.yaml"


async def prepare_server(settings: Settings) -> None:
    """Create pools and automations, and end runs that a previous stack left running."""
    async with get_client() as client:
        for name in (POOL, *settings.pools):
            await _create_pool(client, name, settings)
        for make_automation in (lost_run_automation, lost_cancellation_automation, resume_automation):
            await _replace_automation(client, make_automation(settings))
        await _end_lost_runs(client, settings)


def deploy() -> int:
    """Create every deployment of prefect.yaml, whose runs start in the working folder. Returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / DEFINITIONS.name
        file.touch(mode=0o600)  # parameters of a schedule may be private
        file.write_text(yaml.safe_dump(asyncio.run(deployment_definitions())))
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
        return subprocess.run(command).returncode


async def deployment_definitions() -> dict:
    """Return prefect.yaml, with the schedules, parameters and pause of deployments that exist.

    Users set them in the UI; an update request without them would remove them.
    """
    definitions = yaml.safe_load(DEFINITIONS.read_text())
    named = dict(name=dict(any_=[deployment["name"] for deployment in definitions["deployments"]]))
    async with get_client() as client:
        found = await client.read_deployments(deployment_filter=DeploymentFilter.model_validate(named))
    existing = {deployment.name: deployment for deployment in found}
    for deployment in definitions["deployments"]:
        if present := existing.get(deployment["name"]):
            deployment["schedules"] = [_schedule_definition(schedule) for schedule in present.schedules]
            deployment |= dict(parameters=present.parameters, paused=present.paused)
    return definitions


def _schedule_definition(found: DeploymentSchedule) -> dict:
    """Return a schedule of the server in the form of prefect.yaml."""
    definition = found.schedule.model_dump(mode="json", exclude_none=True)
    if "rrule" in definition:
        definition = dict(rrule=json.dumps(definition))
    definition |= dict(active=found.active, parameters=found.parameters, slug=found.slug)
    return {name: value for name, value in definition.items() if value is not None}


async def deploy_stages(settings: Settings) -> None:
    """Create the deployment `stage/POOL` for each further pool, which runs single stages of other runs.

    Unlike those of prefect.yaml it has no working folder, because its workers may be on other machines.
    """
    if not settings.pools:
        return
    from masters.flows.pool_stage import stage  # imports for seconds, which no other deployment needs

    for pool in settings.pools:
        deployment = await stage.ato_deployment(
            pool,
            description="One stage, requested by a run that waits for it",
            tags=["masters"],
            work_pool_name=pool,
            job_variables={"stream_output": False},
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        await deployment.aapply()


def lost_run_automation(settings: Settings) -> AutomationCore:
    """Return the automation that marks a run Crashed when its heartbeats stop before its end."""
    return AutomationCore(
        name="masters: lost runs are crashed",
        description="A run whose process or machine is gone sends no heartbeat and would stay Running for ever.",
        trigger=_missing_event(
            f"{EVENT}heartbeat", {f"{EVENT}{event}" for event in ALIVE_EVENTS} | END_EVENTS, settings
        ),
        actions=_change_state(StateType.CRASHED, f"no heartbeat for {settings.lost_after} seconds"),
    )


def lost_cancellation_automation(settings: Settings) -> AutomationCore:
    """Return the automation that marks a run Cancelled when its process is gone, so that it is not scheduled again."""
    return AutomationCore(
        name="masters: lost cancellations are done",
        description="A run that is being cancelled and whose worker is gone would stay Cancelling for ever.",
        trigger=_missing_event(f"{EVENT}Cancelling", END_EVENTS, settings),
        actions=_change_state(StateType.CANCELLED, "its process did not end within this time"),
    )


def _missing_event(after: str, expect: set[str], settings: Settings) -> EventTrigger:
    """Return a trigger for runs with none of the expected events within `lost_after`."""
    return EventTrigger(
        match={"prefect.resource.id": f"{EVENT}*"},
        for_each={"prefect.resource.id"},
        after={after},
        expect=expect,
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=settings.lost_after),
    )


def resume_automation(settings: Settings) -> AutomationCore:
    """Return the automation that schedules a crashed run of a deployment again, up to `resumes` times."""
    return AutomationCore(
        name="masters: crashed runs go on",
        description=f"At most {settings.resumes} times; what is built already is reused.",
        enabled=settings.resumes > 0,
        trigger=EventTrigger(
            match={
                "prefect.resource.id": f"{EVENT}*",
                "prefect.run-count": [str(count) for count in range(1, settings.resumes + 1)] or ["none"],
            },
            match_related=[
                {"prefect.resource.role": "deployment"},
                # the run that waits for a stage on another pool requests it again
                {"prefect.resource.role": "flow", "prefect.resource.name": f"!{STAGE_FLOW}"},
            ],
            for_each={"prefect.resource.id"},
            after={f"{EVENT}Crashed"},
            expect=CONTINUATION_EVENTS,
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=settings.resume_after),
        ),
        actions=_change_state(StateType.SCHEDULED, "goes on after a crash", "AwaitingRetry"),
    )


def _change_state(state: StateType, message: str, name: str | None = None) -> list[ActionTypes]:
    return [ChangeFlowRunState(state=state, message=message, name=name, force=False)]


async def _create_pool(client: PrefectClient, name: str, settings: Settings) -> None:
    try:
        await client.read_work_pool(name)
    except ObjectNotFound:
        await client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=job_template()))
    changes: dict[str, Any] = dict(concurrency_limit=settings.runs_at_once, base_job_template=job_template())
    await client.update_work_pool(name, WorkPoolUpdate(**changes))


def job_template() -> dict:
    """Return the job template of a pool. Users choose a run's parameters, not its command, environment or folder.

    The environment has the limits on parameters (MASTERS_ALLOWED_*), so a form must not change it.
    """
    template = ProcessWorker.get_default_base_job_template()
    for name in OWNER_SETTINGS:
        template["job_configuration"].pop(name, None)
        template["variables"]["properties"].pop(name, None)
    return template


async def _end_lost_runs(client: PrefectClient, settings: Settings) -> None:
    """End the pool's open runs before its worker starts, as their processes ended with the previous worker.

    Schedules them again as the automation would, which may miss a Crashed event this early.
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


async def _replace_automation(client: PrefectClient, automation: AutomationCore) -> None:
    """Create or update the automation of this name. An equal one is not touched, as an update resets its state."""
    found = await client.read_automations_by_name(automation.name)
    for extra in found[1:]:
        await client.delete_automation(extra.id)
    if not found:
        await client.create_automation(automation)
    elif AutomationCore.model_validate(found[0].model_dump(include=set(AutomationCore.model_fields))) != automation:
        await client.update_automation(found[0].id, automation)


if __name__ == "__main__":
    environment_settings = Settings.from_environment()
    asyncio.run(prepare_server(environment_settings))
    asyncio.run(deploy_stages(environment_settings))
    sys.exit(deploy())
