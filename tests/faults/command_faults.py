"""Faults around the command line: servers are restarted; engines, the trainer and the run are killed."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.request import urlopen

from masters.infra.ports import free_ports
from masters.store.storage import Storage
from tests.faults import verify_store
from tests.faults.disturbed_runs import LIMIT, MARK, ROOT, Running, Seen, World, stage_of, until
from tests.faults.fault_points import HOWS, At, Fault
from tests.faults.verify_store import Finished
from tests.s3_server import die_with_parent

STEPS_ALONE = ("stage", "train")  # with labels as targets no engine is started
MANY_STEPS = {"train.objective": "kd", "train.targets": "labels", "train.epochs": 60, "runtime.checkpoint_steps": 20}


class Servers:
    """Prefect and MLflow as `masters up` starts them, each at a fixed port, so that it can be killed and come back."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.running = folder, {}
        prefect, mlflow = free_ports(2)
        self.urls = {"prefect": f"http://127.0.0.1:{prefect}/api", "mlflow": f"http://127.0.0.1:{mlflow}"}
        database = ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
        options = ["--host", "127.0.0.1", "--port", str(mlflow), "--workers", "1", *database]
        self.commands = {
            "prefect": ["-m", "masters.infra.prefect_server", str(prefect), str(os.getpid())],
            "mlflow": ["-m", "mlflow", "server", *options, "--artifacts-destination", str(folder / "mlflow")],
        }
        folder.mkdir()
        for name in self.commands:
            self.start(name)
        for name in self.commands:
            self.wait(name)

    def start(self, name: str) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
        small = dict(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", PREFECT_SERVER_ANALYTICS_ENABLED="false")
        with open(self.folder / f"{name}.log", "ab") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, *self.commands[name]], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=kept | small | {"HOME": str(self.folder)}, start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip

    def wait(self, name: str) -> None:
        def answers() -> bool:
            try:
                with urlopen(f"{self.urls[name]}/health", timeout=2):
                    return True
            except OSError:
                return False

        until(answers, name)

    def kill(self, name: str) -> None:
        """Kill a server with its session, that is, all its descendants."""
        os.killpg(self.running[name].pid, signal.SIGKILL)
        self.running[name].wait()

    def close(self) -> None:
        for name in self.running:
            self.kill(name)


class Commands:
    """Runs `masters` as a user does, with these servers, and keeps the results of undisturbed runs."""

    def __init__(self, world: World, servers: Servers) -> None:
        self.world, self.servers = world, servers
        self._made: dict[str, tuple[Finished, list[tuple[str, str]]]] = {}

    def start(self, store: Path, *command: str, fault: Fault | None = None, **values: object) -> Running:
        world = self.world
        chosen = {
            "data.source": world.source, "data.max_rejected_share": 0.2, "store.root": store,
            "train.questions_per_step": 4, "runtime.checkpoint_steps": 2, "runtime.generate_workers": 1,
            "runtime.train_processes": 1, **values,
        }  # fmt: skip
        settings = [part for key, value in chosen.items() for part in ("--set", f"{key}={value}")]
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "AWS_"))}
        ours = {
            "PREFECT_API_URL": self.servers.urls["prefect"], "MLFLOW_TRACKING_URI": self.servers.urls["mlflow"],
            "HOME": str(world.folder / "home"), MARK: str(store), "MASTERS_PYTHON": sys.executable,
        }  # fmt: skip
        log = world.folder / f"{store.name}.log"
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "masters.cli", *command, "configs/easyvqa.toml", *settings], cwd=ROOT,
                env=kept | ours | (fault.variables() if fault else {}), stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
        return _watched(process, log)

    def expected(self, *command: str, **values: object) -> Finished:
        """Return the result of an undisturbed run, whose operations are counted."""
        key = repr((command, sorted(values.items())))
        if key not in self._made:
            store = self.world.store()
            fault = Fault(str(store), str(self.world.folder / f"points-{store.name}"))
            running = self.start(store, *command, fault=fault, **values)
            assert running.wait(2 * LIMIT) == 0, running.said()
            finished, wrong = verify_store.finished(Storage(str(store)))
            assert not wrong
            self._made[key] = finished, fault.counted()
        return self._made[key][0]

    def points(self, role: str, *command: str, **values: object) -> list[str]:
        """Return the operations on the store by processes of this role, in order."""
        self.expected(*command, **values)
        return [where for who, where in self._made[repr((command, sorted(values.items())))][1] if who == role]


def server_away(commands: Commands, name: str, seconds: float) -> Seen:
    """Kill a server once training has begun and start it again: the run continues."""
    world, servers, store = commands.world, commands.servers, commands.world.store()
    expected = commands.expected(*STEPS_ALONE, **MANY_STEPS)

    def disturb() -> tuple[int, list[str]]:
        running = commands.start(store, *STEPS_ALONE, **MANY_STEPS)
        until(lambda: _lines(store, "train-*/rank-0.progress", '"step"') > 2 or running.code is not None, "steps")
        assert running.code is None, running.said()
        servers.kill(name)
        time.sleep(seconds)
        servers.start(name)
        servers.wait(name)
        code = running.wait(LIMIT)
        assert json.loads((store / "summary.json").read_text())["mlflow"]["metrics_lost"] == 0
        return code, [f"server train/{name}"]

    kind = f"{name} away for {seconds:.0f} s"
    return world.disturbed(
        kind, store, disturb, expected=expected, again=lambda: commands.start(store, *STEPS_ALONE, **MANY_STEPS)
    )


def metrics_kept(commands: Commands) -> tuple[int, int]:
    """Return the steps whose loss MLflow has, and the steps taken, of the last tracked training."""
    from mlflow import MlflowClient

    client = MlflowClient(commands.servers.urls["mlflow"])
    experiments = [e.experiment_id for e in client.search_experiments()]
    [run, *_] = client.search_runs(experiments, "tags.`masters.stage` = 'train'", order_by=["start_time DESC"])
    known = {metric.step for metric in client.get_metric_history(run.info.run_id, "loss")}
    expected = commands.expected(*STEPS_ALONE, **MANY_STEPS).values()
    return len(known), sum(len(artifact["tables"].get("history", ())) for artifact in expected)


def with_engines(commands: Commands, rng: random.Random) -> list[Seen]:
    """Run a whole distillation in one store, with kills at seeded operations of the processes.

    The first run is killed by its engine, in the middle of a shard. The second goes on by itself though two engines
    and a trainer are killed. The third is the undisturbed one.
    """
    world, store = commands.world, commands.world.store()
    expected, shard = commands.expected("distill"), _first_shard(commands)
    trainer = rng.randint(1, len(commands.points("trainer", "distill")))
    of_the_run = At("engine", "kill the parent", rng.choice(shard), rng.choice(HOWS))
    on_the_way = (
        # there are two shards more: whether the first is committed or not, the next engine writes at these
        *(At("engine", "kill", rng.choice(shard), rng.choice(HOWS)) for _ in range(2)),
        At("trainer", "kill", trainer, rng.choice(HOWS)),
    )
    first = Fault(str(store), str(world.folder / "faults-first"), (of_the_run,))
    second = Fault(str(store), str(world.folder / "faults-second"), on_the_way)

    def disturb() -> tuple[int, list[str]]:
        running = commands.start(store, "distill", fault=first)
        assert running.wait() == -signal.SIGKILL and world.left(store) == 0, running.said()
        running = commands.start(store, "distill", fault=second)
        assert running.wait(2 * LIMIT) == 0, running.said()
        assert len(second.fired()) == len(on_the_way), second.fired()
        return -signal.SIGKILL, [where for _, where in first.fired()]

    seen = world.disturbed(
        "SIGKILL of the run while its engine writes", store, disturb, expected=expected,
        again=lambda: commands.start(store, "distill"),
    )  # fmt: skip
    more = [
        Seen(f"SIGKILL of the {role} in a run that retries", stage_of(where), where, True, "went on", seen.recovered,
             0.0, verify_store.Verdict(), 0)
        for role, where in second.fired()
    ]  # fmt: skip
    world.seen.extend(more)
    return [seen, *more]


def _first_shard(commands: Commands) -> list[int]:
    """Return an engine's operations from the write of its first shard to the report of it."""
    points = commands.points("engine", "distill")
    wrote = next(n for n, point in enumerate(points, 1) if point.startswith("write shards/"))
    told = next(n for n, point in enumerate(points, 1) if n > wrote and point.startswith("report"))
    return list(range(wrote, told + 1))


def _watched(process: subprocess.Popen, log: Path) -> Running:
    running = Running(0, process.pid, log)

    def wait() -> None:
        running.code = process.wait()
        running.ended.set()

    threading.Thread(target=wait, daemon=True).start()
    return running


def _lines(store: Path, pattern: str, word: str) -> int:
    return sum(file.read_text(errors="replace").count(word) for file in store.glob(f".work/{pattern}"))
