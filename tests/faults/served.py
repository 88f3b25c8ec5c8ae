"""Faults around the command line: its servers go away, its engines, trainer and the run itself are killed."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

from masters.storage import Storage
from tests.faults import judge
from tests.faults.judge import Finished
from tests.faults.world import LIMIT, MARK, ROOT, Running, Seen, World
from tests.s3 import die_with_parent, free_ports

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

        until(answers, name, LIMIT)

    def kill(self, name: str) -> None:
        """With all that it started: its session."""
        os.killpg(self.running[name].pid, signal.SIGKILL)
        self.running[name].wait()

    def close(self) -> None:
        for name in self.running:
            self.kill(name)


class Commands:
    """`masters` as a user runs it, in a world, with these servers; and what its undisturbed runs leave."""

    def __init__(self, world: World, servers: Servers) -> None:
        self.world, self.servers = world, servers
        self._expected: dict[str, Finished] = {}

    def start(self, store: Path, *command: str, **values: object) -> Running:
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
            "HOME": str(world.folder / "home"), MARK: str(store), "VLLM_CACHE_ROOT": str(ROOT / ".venv/vllm"),
        }  # fmt: skip
        log = world.folder / f"{store.name}.log"
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "masters.cli", *command, "configs/demo.toml", *settings], cwd=ROOT,
                env=kept | ours, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                preexec_fn=die_with_parent,
            )  # fmt: skip
        return _watched(process, log)

    def expected(self, *command: str, **values: object) -> Finished:
        key = repr((command, sorted(values.items())))
        if key not in self._expected:
            store = self.world.store()
            running = self.start(store, *command, **values)
            assert running.wait(2 * LIMIT) == 0, running.said()
            self._expected[key], wrong = judge.finished(Storage(str(store)))
            assert not wrong
        return self._expected[key]


def server_away(commands: Commands, name: str, seconds: float) -> Seen:
    """A server is killed once training has begun, and started again: the run goes on."""
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
        return running.wait(LIMIT), [f"server train/{name}"]

    kind = f"{name} away for {seconds:.0f} s"
    return world.disturbed(
        kind, store, disturb, expected=expected, again=lambda: commands.start(store, *STEPS_ALONE, **MANY_STEPS)
    )


def metrics_kept(commands: Commands) -> tuple[int, int]:
    """Of the training that was tracked last: steps whose loss MLflow has, and steps that were taken."""
    from mlflow import MlflowClient

    client = MlflowClient(commands.servers.urls["mlflow"])
    experiments = [e.experiment_id for e in client.search_experiments()]
    [run, *_] = client.search_runs(experiments, "tags.`masters.stage` = 'train'", order_by=["start_time DESC"])
    known = {metric.step for metric in client.get_metric_history(run.info.run_id, "loss")}
    expected = commands.expected(*STEPS_ALONE, **MANY_STEPS).values()
    return len(known), sum(len(artifact["tables"].get("history", ())) for artifact in expected)


def with_engines(commands: Commands, rng: random.Random) -> list[Seen]:
    """A whole distillation: the run is killed while it generates; in the next one an engine, then the trainer."""
    world, store = commands.world, commands.world.store()
    expected = commands.expected("distill")
    kill_flow, kill_engine, kill_trainer = (rng.random() * 2 for _ in range(3))  # seconds after they are met
    killed: list[tuple[str, str]] = []

    def disturb() -> tuple[int, list[str]]:
        first = commands.start(store, "distill")
        until(lambda: _children(store, "engine_worker") or first.code is not None, "an engine", LIMIT)
        time.sleep(kill_flow)
        first.kill()
        killed.append(("SIGKILL of the run while an engine starts", "kill generate/flow"))
        assert first.wait(30) == -signal.SIGKILL and world.left(store) == 0
        second = commands.start(store, "distill")
        until(lambda: list(store.glob("shards/responses/*.parquet")) or second.code is not None, "a shard", LIMIT)
        time.sleep(kill_engine / 10)
        if (engine := _one(store, "engine_worker")) and _kill(engine):
            killed.append(("SIGKILL of an engine", "kill generate/engine"))
        until(lambda: _lines(store, "train-*/rank-0.progress", '"step"') or second.code is not None, "a step", LIMIT)
        time.sleep(kill_trainer / 10)
        if (trainer := _one(store, "train_worker")) and _kill(trainer):
            killed.append(("SIGKILL of the trainer in a whole run", "kill train/trainer"))
        return second.wait(2 * LIMIT), [killed[0][1]]

    seen = world.disturbed(
        killed[0][0] if killed else "SIGKILL of the run while an engine starts", store, disturb, expected=expected,
        again=lambda: commands.start(store, "distill"),
    )  # fmt: skip
    seen.signal, seen.outcome = True, "killed"
    more = [
        Seen(kind, where.split(" ")[1].split("/")[0], where, True, "went on", seen.recovered, 0.0, judge.Verdict(), 0)
        for kind, where in killed[1:]
    ]
    world.seen.extend(more)
    return [seen, *more]


def until(condition: Callable[[], object], what: str, seconds: float = LIMIT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def _watched(process: subprocess.Popen, log: Path) -> Running:
    running = Running(0, process.pid, log)

    def wait() -> None:
        running.code = process.wait()
        running.ended.set()

    threading.Thread(target=wait, daemon=True).start()
    return running


def _lines(store: Path, pattern: str, word: str) -> int:
    return sum(file.read_text(errors="replace").count(word) for file in store.glob(f".work/{pattern}"))


def _children(store: Path, module: str) -> list[int]:
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if module in line.read_text() and f"{MARK}={store}" in (line.parent / "environ").read_text():
                found.append(int(line.parent.name))
        except OSError:
            continue
    return sorted(found)


def _one(store: Path, module: str) -> int | None:
    return next(iter(_children(store, module)), None)


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
