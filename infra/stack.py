"""The local stack: `masters up` and `masters down`. Everything listens on loopback and keeps its state in one folder.

`light` is Prefect and MLflow on SQLite files; `full` adds Postgres for both and an S3-compatible store.
"""

import fcntl
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from masters.common.errors import InputError, MastersError
from masters.infra import object_store, postgres
from masters.infra.api import answers, post, worker_is_online
from masters.infra.service import Service, Started, log_of, start, stop, wait
from masters.infra.settings import POOL, Services, Settings, home

START_SECONDS = 120
LIVE = ["RUNNING", "PENDING"]
INTERRUPTED = [*LIVE, "CRASHED"]
OWN = ("PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH", "PREFECT_HOME")


class Stack:
    """A stack that runs or is being started: its state file is written before anything is waited for."""

    def __init__(self, folder: Path, state: dict) -> None:
        self.folder, self.state = folder, state

    @property
    def services(self) -> list[Started]:
        return [Started(**service) for service in self.state["started"]]

    @property
    def urls(self) -> dict[str, str]:
        return {name: self.state[name] for name in ("prefect_url", "mlflow_url")}

    def start(self, *wanted: Service) -> None:
        """Start them side by side, then wait until all answer."""
        started = []
        for service in wanted:
            started.append(start(service, self.folder, self.state["id"]))
            self.state["started"].append(started[-1].as_dict())
            _write(self.folder / "stack.json", json.dumps(self.state, indent=1))
        for service, process in zip(wanted, started, strict=True):
            wait(service, process, self.folder, START_SECONDS)

    def stop(self) -> None:
        """The worker first, while the server can still be told of its runs; the rest in the opposite of their order."""
        for service in reversed(self.services):
            live = self._runs(LIVE) if service.name == "worker" else set()
            stop(service)
            for run in live & self._runs(INTERRUPTED) if live else ():
                self._goes_on(run)
        shutil.rmtree(self.state["sockets"], ignore_errors=True)
        for name in ("stack.json", "env"):
            (self.folder / name).unlink(missing_ok=True)

    def _runs(self, states: list[str]) -> set[str]:
        """Ids of the pool's runs in one of these states; none if the server does not answer."""
        wanted = {"flow_runs": {"state": {"type": {"any_": states}}}, "work_pools": {"name": {"any_": [POOL]}}}
        return {run["id"] for run in post(f"{self.state['prefect_url']}/api/flow_runs/filter", wanted) or []}

    def _goes_on(self, run: str) -> None:
        """Its worker is gone and the run with it: the next worker takes it up."""
        state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "interrupted by `masters down`"}
        post(f"{self.state['prefect_url']}/api/flow_runs/{run}/set_state", {"state": state, "force": True})


def up(services: Services) -> tuple[Stack, bool]:
    """The running stack, and whether it was started now. Returns when all of it answers."""
    folder = home()
    with _alone(folder):
        stack = _read(folder)
        if stack and all(service.alive() for service in stack.services) and stack.state["ready"]:
            if stack.state["services"] != services:
                raise InputError(f"the {stack.state['services']} stack runs in {folder}: `masters down` first")
            return stack, False
        if stack:  # a part of it has ended: what is left makes room
            stack.stop()
        settings = Settings.from_environment()
        _check_ports(settings, services)
        stack = _new(folder, services, settings)
        try:
            _start(stack, services, settings)
        except BaseException:
            stack.stop()
            raise
        return stack, True


def down() -> bool:
    """Stop what `up` started, and nothing else. Returns whether there was anything."""
    folder = home()
    if not folder.exists():
        return False
    with _alone(folder):
        stack = _read(folder)
        if stack:
            stack.stop()
        return stack is not None


def _start(stack: Stack, services: Services, settings: Settings) -> None:
    folder, environment = stack.folder, _environment(stack.folder)
    backends = {"prefect": "", "mlflow": f"sqlite:///{folder / 'mlflow.db'}", "files": str(folder / "mlflow")}
    s3: dict[str, str] = {}
    if services == Services.FULL:
        s3 = object_store.environment_of(folder / "s3", settings.s3_port)
        backends = _full(stack, settings, environment)
    stack.start(
        _prefect(settings, environment, backends["prefect"]),
        _mlflow(settings, environment | s3, backends["mlflow"], backends["files"]),
    )
    api = f"{stack.state['prefect_url']}/api"
    ours = {"PREFECT_API_URL": api, "MLFLOW_TRACKING_URI": stack.state["mlflow_url"], **s3}
    _deploy(folder, environment | ours)
    stack.start(_worker(environment | ours, api))
    _write(folder / "env", "".join(f"export {name}={value}\n" for name, value in ours.items()))
    stack.state["ready"] = True
    _write(folder / "stack.json", json.dumps(stack.state, indent=1))


def _full(stack: Stack, settings: Settings, environment: dict[str, str]) -> dict[str, str]:
    """Postgres and S3, up; and where Prefect and MLflow keep what is theirs."""
    sockets = Path(stack.state["sockets"])
    stack.start(
        postgres.service(stack.folder / "postgres", sockets, environment),
        object_store.service(stack.folder / "s3", settings.s3_port, environment),
    )
    postgres.create_databases(sockets)
    return {
        "prefect": f"postgresql+asyncpg://postgres@/prefect?host={sockets}",
        "mlflow": f"postgresql+psycopg2://postgres@/mlflow?host={sockets}",
        "files": "s3://mlflow",
    }


def _prefect(settings: Settings, environment: dict[str, str], database: str) -> Service:
    port = str(settings.prefect_port)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
    chosen = {"PREFECT_UI_API_URL": f"http://127.0.0.1:{port}/api"}  # else the pages ask the default port
    chosen |= {"PREFECT_API_DATABASE_CONNECTION_URL": database} if database else {}
    return Service("prefect", command, environment | chosen, lambda: answers(f"http://127.0.0.1:{port}/api/health"))


def _mlflow(settings: Settings, environment: dict[str, str], database: str, files: str) -> Service:
    port = str(settings.mlflow_port)
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1",
        "--backend-store-uri", database, "--artifacts-destination", files,
    ]  # fmt: skip
    return Service("mlflow", command, environment, lambda: answers(f"http://127.0.0.1:{port}/health"))


def _worker(environment: dict[str, str], api: str) -> Service:
    name = f"local-{secrets.token_hex(3)}"
    command = [
        sys.executable, "-m", "masters.infra.worker", "worker", "start", "--pool", POOL, "--type", "process",
        "--name", name, "--install-policy", "never",
    ]  # fmt: skip
    return Service("worker", command, environment, lambda: worker_is_online(api, POOL, name))


def _deploy(folder: Path, environment: dict[str, str]) -> None:
    log = log_of(folder, "deployments")
    with open(log, "wb") as output:
        done = subprocess.run(
            [sys.executable, "-m", "masters.infra.deployments"],
            env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    if done.returncode:
        raise MastersError(f"the deployments of prefect.yaml could not be made (log: {log})")


def _environment(folder: Path) -> dict[str, str]:
    """What all services inherit: ours, without a server or profile of Prefect that the user may have set."""
    inherited = {name: value for name, value in os.environ.items() if name not in OWN}
    return inherited | {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def _check_ports(settings: Settings, services: Services) -> None:
    wanted = ["prefect_port", "mlflow_port", *(["s3_port"] if services == Services.FULL else [])]
    for name in wanted:
        port = getattr(settings, name)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: one just closed is free
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                variable = f"MASTERS_{name.upper()}"
                raise InputError(
                    f"port {port} cannot be had ({error.strerror}): end what holds it, or set {variable}"
                ) from None


def _new(folder: Path, services: Services, settings: Settings) -> Stack:
    return Stack(
        folder,
        dict(
            id=secrets.token_hex(8), services=services, ready=False, started=[],
            prefect_url=f"http://127.0.0.1:{settings.prefect_port}",
            mlflow_url=f"http://127.0.0.1:{settings.mlflow_port}",
            sockets=tempfile.mkdtemp(prefix="masters-"),  # its path must be short
        ),
    )  # fmt: skip


def _read(folder: Path) -> Stack | None:
    try:
        return Stack(folder, json.loads((folder / "stack.json").read_text()))
    except FileNotFoundError:
        return None


def _write(path: Path, text: str) -> None:
    """Whole or not at all, for the owner's eyes: the environment of a full stack holds the keys of its store."""
    new = path.with_suffix(".new")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    new.replace(path)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One `up` or `down` at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
