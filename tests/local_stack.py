"""The full local stack for tests, as a user starts it: Prefect and MLflow on Postgres, an S3 store, a worker."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from urllib.request import urlopen

from masters.infra.api import post
from masters.infra.ports import free_ports
from masters.infra.service import StartedService
from tests import fork_server
from tests.command_line import share_notes
from tests.listening_sockets import addresses, reachable, sockets
from tests.process_table import command_line, processes_with_variable

ROOT = Path(__file__).parents[1]
PATIENCE = 900.0  # seconds for what takes a minute or two, whatever else the machine does
SELDOM = 1.0  # seconds between questions to a server while a run, which wants the processor, goes to its end
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
RESUMED = ("COMPLETED", "FAILED", "CANCELLED")  # ends of a run that may crash and go on
PORTS = ("MASTERS_PREFECT_PORT", "MASTERS_MLFLOW_PORT", "MASTERS_S3_PORT")


@dataclass
class Stack:
    """A stack in a folder of its own, up or down."""

    folder: Path
    environment: dict[str, str] = field(repr=False)
    urls: dict[str, str] = field(default_factory=dict)
    listened: set[str] = field(default_factory=set)  # programs that were seen listening
    reached: set[tuple[str, int, str]] = field(default_factory=set)  # address, port and program of others' reach

    @property
    def api(self) -> str:
        return f"{self.urls['prefect_url']}/api"

    def masters(self, *arguments: str) -> subprocess.CompletedProcess:
        """Start the command line in the checkout."""
        command = [sys.executable, "-m", "masters.cli", *arguments]
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=900)

    def up(self) -> None:
        done = self.masters("up", "--json")
        assert done.returncode == 0, done.stderr[-2000:] + self.logs()
        self.urls = json.loads(done.stdout.splitlines()[-1])

    def down(self) -> None:
        recorded = self.folder / "home/stack.json"
        started = json.loads(recorded.read_text())["started"] if recorded.exists() else []
        done = self.masters("down")
        assert done.returncode == 0, done.stderr[-2000:]
        assert [service["name"] for service in started if StartedService(**service).is_alive()] == []

    def client_environment(self) -> dict[str, str]:
        """Return the variables that `source MASTERS_HOME/env` gives a shell."""
        lines = (self.folder / "home/env").read_text().splitlines()
        return dict(line.removeprefix("export ").split("=", 1) for line in lines)

    def start(self, deployment: str, **parameters: object) -> str:
        """Start a run of the deployment and return its id."""
        found = post(f"{self.api}/deployments/filter", {"deployments": {"name": {"any_": [deployment]}}})
        body = {"parameters": parameters, "idempotency_key": secrets.token_hex(8)}  # a lost answer is asked for again
        run = post(f"{self.api}/deployments/{found[0]['id']}/create_flow_run", body)
        assert run, f"{deployment} was refused"
        return run["id"]

    def run(self, identifier: str) -> dict:
        return post(f"{self.api}/flow_runs/filter", {"flow_runs": {"id": {"any_": [identifier]}}})[0]

    def history(self, identifier: str) -> str:
        """Return the run's states, one per line with its cause, for a test that fails."""
        found = json.loads(urlopen(f"{self.api}/flow_run_states/?flow_run_id={identifier}", timeout=60).read())
        found.sort(key=lambda state: state["timestamp"])
        return "\n".join(f"{state['timestamp'][:19]} {state['name']}: {state['message']}" for state in found)

    def complete(self, identifier: str, ends: tuple[str, ...] = ENDED) -> None:
        """Wait for its end, which must be a good one."""
        with suppress(AssertionError):
            until(lambda: self.run(identifier)["state_type"] in ends, "its end", every=SELDOM)
        assert self.run(identifier)["state_type"] == "COMPLETED", self.history(identifier)

    def cancel(self, identifier: str) -> None:
        """Cancel a run as the UI's button does."""
        state = {"type": "CANCELLING", "name": "Cancelling"}
        post(f"{self.api}/flow_runs/{identifier}/set_state", {"state": state})

    def processes(self) -> dict[int, str]:
        """Return pid and command line of all processes with this stack's home, whoever started them."""
        found = processes_with_variable("MASTERS_HOME", str(self.folder / "home"))
        return {process.pid: command_line(process) for process in found}

    def children(self, module: str = "masters.models.") -> dict[int, str]:
        """Return the engines and trainers among the stack's processes."""
        return {pid: line for pid, line in self.processes().items() if module in line}

    def look(self, ended: Event) -> None:
        """Until `ended`: what listens of all that belongs to the stack, engines and trainers included."""
        while not ended.wait(1.0):
            there = sockets()
            for pid, line in self.processes().items():
                if addresses({pid}, there):
                    self.listened.add(line)
                self.reached |= {(address, port, line) for address, port in reachable({pid}, there)}
            self.reached |= {(address, port, "forked") for address, port in reachable(fork_server.programs(), there)}

    def logs(self) -> str:
        logs = sorted((self.folder / "home/logs").glob("*.log"))
        return "".join(f"\n--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)


@contextmanager
def serve(**settings: int | str) -> Iterator[Stack]:
    """A full stack (`stack`: "light") that is up; afterwards down, its folder gone. Settings: infra/settings.py."""
    folder = Path(tempfile.mkdtemp(prefix="masters-stack-"))
    folder.chmod(0o711)  # as root, Postgres runs as someone else, who must get through
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "AWS_", "MASTERS_"))}
    share_notes(folder / "user")
    chosen = {f"MASTERS_{name.upper()}": str(value) for name, value in settings.items()}
    ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
    own = {"MASTERS_HOME": str(folder / "home"), "MASTERS_STACK": "full", "HOME": str(folder / "user")}
    own["MASTERS_PYTHON"] = fork_server.PYTHON
    stack = Stack(folder, kept | own | ports | chosen)
    ended = Event()
    watch = Thread(target=stack.look, args=(ended,), daemon=True)
    watch.start()
    try:
        stack.up()
        yield stack
    finally:
        ended.set()
        watch.join()
        stack.down()
        shutil.rmtree(folder)
    assert stack.reached == set()
    services = ["prefect", "mlflow"] if settings.get("stack") == "light" else ["prefect", "mlflow", "weed"]
    missing = [name for name in services if not any(name in line for line in stack.listened)]
    assert missing == []  # else nothing was looked at


def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE, every: float = 0.3) -> float:
    """Wait for it; the seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds} s: {what}"
        time.sleep(every)
    return time.monotonic() - began
