"""prefect.yaml, the container files and the Kubernetes template are valid, without running them."""

import asyncio
import json
import subprocess
import sys
import uuid
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import kubernetes_asyncio.client as kubernetes
import pytest
import yaml
from prefect.client.schemas.objects import FlowRun
from prefect.flows import Flow
from prefect.utilities.schema_tools.validation import ValidationError, validate
from prefect.utilities.templating import apply_values
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

from masters.config.allowlist import Setting
from masters.flows import webhook
from masters.infra.deployments import DEFINITIONS
from masters.infra.settings import POOL, Settings
from masters.rewards import judge_server
from masters.tracking import client

INFRA = Path(__file__).parents[2] / "infra"
TEMPLATE = json.loads((INFRA / "kubernetes-job-template.json").read_text())


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess:
    program = Path(sys.executable).with_name(name)
    return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True)


def test_every_deployment_is_a_flow_in_the_stacks_pool() -> None:
    deployments = yaml.safe_load(DEFINITIONS.read_text())["deployments"]
    assert {"distill", "nightly", "evaluate", "study"} <= {deployment["name"] for deployment in deployments}
    for deployment in deployments:
        module, _, name = deployment["entrypoint"].rpartition(".")
        assert isinstance(getattr(import_module(module), name), Flow)
        assert deployment["work_pool"]["name"] == POOL and deployment["tags"]


def test_the_container_file_is_clean() -> None:
    done = tool("hadolint", INFRA / "Dockerfile")
    assert done.returncode == 0, done.stdout


def test_yaml_is_clean() -> None:
    rules = (
        "{extends: default, rules: {document-start: disable, line-length: {max: 120}, braces: disable, comments: {}}}"
    )
    done = tool("yamllint", "--strict", "-d", rules, INFRA / "compose.yaml", DEFINITIONS.resolve())
    assert done.returncode == 0, done.stdout


def test_the_compose_file_follows_the_specification() -> None:
    done = tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", INFRA / "compose.yaml")
    assert done.returncode == 0, done.stdout


def test_the_compose_file_has_no_secrets_and_publishes_on_loopback_only() -> None:
    services = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
    for name, service in services.items():
        for variable, value in service.get("environment", {}).items():
            if any(word in variable for word in ("PASSWORD", "SECRET", "ACCESS_KEY")):
                assert value.startswith("${"), f"{name}: {variable}"
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
    for service in services.values():
        for needed in service.get("depends_on", {}):
            assert needed in services


def test_compose_passes_limits_and_credentials_from_the_environment() -> None:
    """Variables without a value come from the environment of `docker compose`."""
    services = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
    for worker in ("worker", "worker-gpu"):
        environment = services[worker]["environment"]
        given = {name for name, value in environment.items() if value is None}
        assert {*Setting, webhook.URL_VARIABLE, judge_server.API_KEY_VARIABLE, "HF_TOKEN"} <= given
        assert environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] and environment["MLFLOW_TRACKING_URI"]
        assert environment[client.PUBLIC_URL].endswith("http://127.0.0.1:5000}")
    limits = {f"MASTERS_{f.name.upper()}" for f in fields(Settings) if not f.name.endswith("_port")}
    assert limits <= services["deployments"]["environment"].keys()


def rendered(**values: object) -> KubernetesWorkerJobConfiguration:
    """Return a run's job as a Kubernetes worker submits it."""
    properties = TEMPLATE["variables"]["properties"]
    defaults = {name: of["default"] for name, of in properties.items() if "default" in of}
    filled = apply_values(TEMPLATE["job_configuration"], defaults | values)
    job = KubernetesWorkerJobConfiguration.model_validate(filled)
    job.prepare_for_flow_run(FlowRun(id=uuid.uuid4(), flow_id=uuid.uuid4(), name="a-run"))
    return job


def test_a_job_requests_its_gpus() -> None:
    pod = rendered(gpus=4, memory="256Gi").job_manifest["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["resources"]["limits"] == {"memory": "256Gi", "nvidia.com/gpu": 4}
    assert container["resources"]["requests"] == {"cpu": "8", "memory": "256Gi", "nvidia.com/gpu": 4}
    assert container["args"] == ["prefect", "flow-run", "execute"]
    assert {"name", "value"} == set(container["env"][0])


def test_a_job_matches_the_kubernetes_schema() -> None:
    """A round trip through the API's own model loses nothing."""

    async def again(job: dict) -> dict:
        async with kubernetes.ApiClient(kubernetes.Configuration()) as api:
            answer = SimpleNamespace(data=json.dumps(job))
            return api.sanitize_for_serialization(api.deserialize(answer, "V1Job"))

    job = rendered().job_manifest
    for name in ("parallelism", "completions"):  # Prefect demands them there, Kubernetes drops them
        job["spec"]["template"]["spec"].pop(name)
    for amounts in job["spec"]["template"]["spec"]["containers"][0]["resources"].values():
        amounts.update({what: str(amount) for what, amount in amounts.items()})  # the model's quantities are texts
    assert asyncio.run(again(job)) == job


def test_the_template_names_every_variable_that_it_uses() -> None:
    text = json.dumps(TEMPLATE["job_configuration"])
    unused = [name for name in TEMPLATE["variables"]["properties"] if f"{{{{ {name} }}}}" not in text]
    assert unused == []


@pytest.mark.parametrize("wrong", [{"gpus": -1}, {"gpus": "two"}])
def test_values_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        validate(wrong, TEMPLATE["variables"], raise_on_error=True)
