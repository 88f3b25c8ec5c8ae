"""The local stack of `masters up` and `masters down`. Its servers listen on loopback and keep state in one folder.

`light` has Prefect and MLflow on SQLite files; `full` adds Postgres for both and an S3-compatible store.
"""

import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

from masters.common.errors import InputError, MastersError
from masters.common.files import check_writable, write_atomically
from masters.common.log_errors import find_error
from masters.infra import object_store, postgres
from masters.infra.api import is_responding, post, worker_is_online
from masters.infra.service import Service, StartedService, log_file, start_service, stop_service, wait_until_ready
from masters.infra.settings import HOME, POOL, Services, Settings, home

START_SECONDS = 120
OPEN_STATES = ["RUNNING", "PENDING"]
INTERRUPTED_STATES = [*OPEN_STATES, "CRASHED"]
LEASE_STORAGE = "prefect.server.concurrency.lease_storage.filesystem"  # a restarted server still knows who runs
PREFECT_VARIABLES = ("PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH", "PREFECT_HOME")


class Stack:
    """A stack that runs or is being started. Each service is in the state file before it is waited for."""

    def __init__(self, folder: Path, state: dict) -> None:
        self.folder, self.state = folder, state

    @property
    def services(self) -> list[StartedService]:
        return [StartedService(**service) for service in self.state["started"]]

    @property
    def urls(self) -> dict[str, str]:
        return {name: self.state[name] for name in ("prefect_url", "mlflow_url")}

    def start(self, *services: Service) -> None:
        """Start services at the same time and wait until all are ready."""
        started = []
        for service in services:
            started.append(start_service(service, self.folder, self.state["id"]))
            self.state["started"].append(started[-1].as_dict())
            self.write_state()
        for service, process in zip(services, started, strict=True):
            wait_until_ready(service, process, self.folder, START_SECONDS)

    def stop(self) -> None:
        """Stop the services in reverse order: the worker before the server, which then reschedules its runs."""
        for service in reversed(self.services):
            runs = self._find_runs(OPEN_STATES) if service.name == "worker" else set()
            stop_service(service)
            for run in runs & self._find_runs(INTERRUPTED_STATES) if runs else ():
                self._reschedule(run)
        shutil.rmtree(self.state["sockets"], ignore_errors=True)
        for name in ("stack.json", "env"):
            (self.folder / name).unlink(missing_ok=True)

    def write_state(self) -> None:
        """Write the state file. Only the owner can read it."""
        write_atomically(self.folder / "stack.json", json.dumps(self.state, indent=1), mode=0o600)

    def _find_runs(self, states: list[str]) -> set[str]:
        """Return the ids of the pool's runs in these states; an empty set if the server does not answer."""
        query = {"flow_runs": {"state": {"type": {"any_": states}}}, "work_pools": {"name": {"any_": [POOL]}}}
        return {run["id"] for run in post(f"{self.state['prefect_url']}/api/flow_runs/filter", query) or []}

    def _reschedule(self, run: str) -> None:
        """Schedule a run that ended with its worker, so that the next worker continues it."""
        state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "interrupted by `masters down`"}
        post(f"{self.state['prefect_url']}/api/flow_runs/{run}/set_state", {"state": state, "force": True})


def up(services: Services) -> tuple[Stack, bool]:
    """Start the stack unless it runs, and wait until it is ready. Returns it, and whether it was started now."""
    folder = home()
    with _exclusive(folder):
        stack = _read_state(folder)
        if stack and all(service.is_alive() for service in stack.services) and stack.state["ready"]:
            if stack.state["services"] != services:
                raise InputError(f"the {stack.state['services']} stack runs in {folder}: `masters down` first")
            return stack, False
        if stack:  # a part of it has ended: stop the rest
            stack.stop()
        settings = Settings.from_environment()
        _check_ports(settings, services)
        stack = _new_stack(folder, services, settings)
        try:
            _start_services(stack, services, settings)
        except BaseException:
            stack.stop()
            raise
        return stack, True


def down() -> bool:
    """Stop what `up` started. Returns whether there was a stack."""
    folder = home()
    if not folder.exists():
        return False
    with _exclusive(folder):
        stack = _read_state(folder)
        if stack:
            stack.stop()
        return stack is not None


def _start_services(stack: Stack, services: Services, settings: Settings) -> None:
    folder, environment = stack.folder, _environment(stack.folder)
    backends = {"prefect": "", "mlflow": f"sqlite:///{folder / 'mlflow.db'}", "files": str(folder / "mlflow")}
    s3: dict[str, str] = {}
    if services == Services.FULL:
        s3 = object_store.client_environment(folder / "s3", settings.s3_port)
        backends = _start_backends(stack, settings, environment)
    stack.start(
        _prefect(settings, environment, backends["prefect"]),
        _mlflow(settings, environment | s3, backends["mlflow"], backends["files"]),
    )
    api = f"{stack.state['prefect_url']}/api"
    addresses = {"PREFECT_API_URL": api, "MLFLOW_TRACKING_URI": stack.state["mlflow_url"], **s3}
    _deploy(folder, environment | addresses)
    stack.start(_worker(environment | addresses, api))
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in addresses.items())
    write_atomically(folder / "env", exports, mode=0o600)  # it has the keys of the S3 store
    stack.state["ready"] = True
    stack.write_state()


def _start_backends(stack: Stack, settings: Settings, environment: dict[str, str]) -> dict[str, str]:
    """Start Postgres and S3. Returns the databases of Prefect and MLflow, and MLflow's folder for files."""
    sockets = Path(stack.state["sockets"])
    stack.start(
        postgres.make_service(stack.folder / "postgres", sockets, environment),
        object_store.make_service(stack.folder / "s3", settings.s3_port, environment),
    )
    postgres.create_databases(sockets)
    return {
        "prefect": f"postgresql+asyncpg://postgres@/prefect?host={sockets}",
        "mlflow": f"postgresql+psycopg2://postgres@/mlflow?host={sockets}",
        "files": "s3://mlflow",
    }


def _prefect(settings: Settings, environment: dict[str, str], database: str) -> Service:
    port = str(settings.prefect_port)
    command = [sys.executable, "-m", "masters.infra.prefect_server", port]
    variables = {"PREFECT_UI_API_URL": f"http://127.0.0.1:{port}/api"}  # else the pages use the default port
    variables |= {"PREFECT_API_DATABASE_CONNECTION_URL": database} if database else {}
    health = f"http://127.0.0.1:{port}/api/health"
    return Service("prefect", command, environment | variables, lambda: is_responding(health))


def _mlflow(settings: Settings, environment: dict[str, str], database: str, files: str) -> Service:
    port = str(settings.mlflow_port)
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--workers",
        "1",
        "--backend-store-uri",
        database,
        "--artifacts-destination",
        files,
    ]
    return Service("mlflow", command, environment, lambda: is_responding(f"http://127.0.0.1:{port}/health"))


def _worker(environment: dict[str, str], api: str) -> Service:
    name = f"local-{secrets.token_hex(3)}"
    command = [
        sys.executable,
        "-m",
        "masters.infra.worker",
        "worker",
        "start",
        "--pool",
        POOL,
        "--type",
        "process",
        "--name",
        name,
        "--install-policy",
        "never",
    ]
    return Service("worker", command, environment, lambda: worker_is_online(api, POOL, name))


def _deploy(folder: Path, environment: dict[str, str]) -> None:
    log = log_file(folder, "deployments")
    with open(log, "wb") as output:
        done = subprocess.run(
            [sys.executable, "-m", "masters.infra.deployments"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    if done.returncode:
        reason = find_error(log.read_text(errors="replace"))
        raise MastersError(f"the deployments of prefect.yaml could not be created: {reason} (log: {log})")


def _environment(folder: Path) -> dict[str, str]:
    """Return the environment of all services: this process's, without the user's server or profile of Prefect."""
    inherited = {name: value for name, value in os.environ.items() if name not in PREFECT_VARIABLES}
    return inherited | {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": LEASE_STORAGE,
        "DO_NOT_TRACK": "1",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def _check_ports(settings: Settings, services: Services) -> None:
    names = ["prefect_port", "mlflow_port", *(["s3_port"] if services == Services.FULL else [])]
    for name in names:
        port = getattr(settings, name)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a port just closed is free
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                variable = f"MASTERS_{name.upper()}"
                raise InputError(
                    f"port {port} cannot be bound ({error.strerror}): end the process that uses it, or set {variable}"
                ) from None


def _new_stack(folder: Path, services: Services, settings: Settings) -> Stack:
    return Stack(
        folder,
        dict(
            id=secrets.token_hex(8),
            services=services,
            ready=False,
            started=[],
            prefect_url=f"http://127.0.0.1:{settings.prefect_port}",
            mlflow_url=f"http://127.0.0.1:{settings.mlflow_port}",
            sockets=tempfile.mkdtemp(prefix="masters-"),  # its path must be short
        ),
    )


def _read_state(folder: Path) -> Stack | None:
    try:
        return Stack(folder, json.loads((folder / "stack.json").read_text()))
    except FileNotFoundError:
        return None


def _exclusive(folder: Path) -> FileLock:
    """Return the lock that lets one `up` or `down` run at a time."""
    check_writable(folder, "the stack's databases, files and logs", f"set {HOME} or HOME to another folder")
    return FileLock(folder / "lock")
