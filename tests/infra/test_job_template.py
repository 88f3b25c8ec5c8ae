"""The job variables of the pool `masters`, which a run can be given besides its parameters."""

import uuid

from prefect.client.schemas.objects import FlowRun
from prefect.utilities.templating import apply_values
from prefect.workers.process import ProcessJobConfiguration

from masters.flows.pool_stage import stage
from masters.infra.deployments import OWNER_SETTINGS, STAGE_FLOW, job_template, resume_automation
from masters.infra.settings import Settings


def configured(**values: object) -> ProcessJobConfiguration:
    """Return a run's job as the process worker makes it from the form's job variables."""
    template = job_template()
    properties = template["variables"]["properties"]
    defaults = {name: of["default"] for name, of in properties.items() if "default" in of}
    job = ProcessJobConfiguration.model_validate(apply_values(template["job_configuration"], defaults | values))
    job.prepare_for_flow_run(FlowRun(id=uuid.uuid4(), flow_id=uuid.uuid4(), name="a-run"))
    return job


def test_command_environment_and_folder_cannot_be_set() -> None:
    hostile = configured(
        command="touch /tmp/owned",
        env={"MASTERS_ALLOWED_STORES": "/", "PYTHONPATH": "/tmp/evil"},
        working_dir="/tmp/evil",
    )
    plain = configured()
    assert (hostile.command, hostile.working_dir) == (plain.command, plain.working_dir)
    assert hostile.env == plain.env | {name: hostile.env[name] for name in ("PREFECT__FLOW_RUN_ID", "PREFECT__FLOW_ID")}
    assert set(OWNER_SETTINGS).isdisjoint(job_template()["variables"]["properties"])


def test_job_variables_of_deployments_are_kept() -> None:
    assert configured(stream_output=False).stream_output is False


def test_the_resume_automation_ignores_stages() -> None:
    assert stage.name == STAGE_FLOW
    related = [of.root for of in resume_automation(Settings()).trigger.match_related]
    assert {"prefect.resource.role": "flow", "prefect.resource.name": f"!{STAGE_FLOW}"} in related
