"""The setting of the fault tests: a process that forks pipelines, a source, a tracking database, and results."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from masters.config.stages import Stage
from masters.store.storage import Storage
from tests.faults import verify_store
from tests.faults.fault_points import Fault
from tests.faults.run_spec import Shape
from tests.faults.verify_store import Finished, Verdict
from tests.process_table import command_line, processes_with_variable
from tests.s3_server import BUCKET
from tests.shape_data import write_questions

ROOT = Path(__file__).parents[2]
MARK = "MASTERS_FAULTS"
QUESTIONS = 24
SCORE, TRAIN, REGISTER = (Shape(until) for until in (Stage.SCORE, Stage.TRAIN, Stage.REGISTER))
TWO_RANKS = Shape(Stage.TRAIN, ranks=2)
LIMIT = 600.0  # seconds that a run may take before it counts as hanging; machines are slow and shared


@dataclass
class Seen:
    """A fault that occurred and the outcome of the run: a row of the report."""

    kind: str
    stage: str
    where: str
    signal: bool  # a process was ended by SIGKILL
    outcome: str  # "killed", "failed" (one line), "went on"
    recovered: bool
    seconds: float
    verdict: Verdict
    left: int  # processes
    test: str = field(default_factory=lambda: _test())


@dataclass
class Running:
    id: int
    pid: int
    log: Path
    ended: threading.Event = field(default_factory=threading.Event)
    code: int | None = None

    def wait(self, seconds: float = LIMIT) -> int:
        if not self.ended.wait(seconds):
            self.kill()
            raise AssertionError(f"hangs for {seconds:.0f} s: {self.said()}")
        assert self.code is not None
        return self.code

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""

    def outcome(self, stage: str) -> str:
        """Return "built" or "reused"."""
        return next(line.split()[1] for line in self.said().splitlines() if line.startswith(f"{stage} "))


class Zygote:
    """The other end of `tests.faults.forked_pipelines`."""

    def __init__(self, folder: Path) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HOME": str(folder / "home"),
            "MASTERS_PYTHON": sys.executable,  # a fault may kill a child's parent, which must be the run
        }  # fmt: skip
        self.folder, self.number, self.known, self.lock = folder, 0, {}, threading.Condition()
        with open(folder / "zygote.log", "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.forked_pipelines"], cwd=ROOT, env=environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            told = json.loads(line)
            with self.lock:
                if "pid" in told:
                    self.known[told["id"]] = Running(told["id"], told["pid"], self._log(told["id"]))
                else:
                    self.known[told["id"]].code = told["code"]
                    self.known[told["id"]].ended.set()
                self.lock.notify_all()

    def _log(self, number: int) -> Path:
        return self.folder / f"run-{number}.log"

    def fork(self, job: dict, environment: dict[str, str]) -> Running:
        with self.lock:
            self.number += 1
            number = self.number
            order = dict(id=number, log=str(self._log(number)), environment=environment, job=job)
            assert self.process.stdin
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()
            began = self.lock.wait_for(lambda: number in self.known, 120)
        assert began, (self.folder / "zygote.log").read_text()[-2000:]
        return self.known[number]

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class World:
    """Runs pipelines with and without faults, and keeps what was seen."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.stores, self.seen = folder, 0, []
        (folder / "home").mkdir(parents=True)
        self.source = write_questions(folder / "source", QUESTIONS)
        self.mlflow = f"sqlite:///{folder / 'mlflow.db'}"
        self.zygote = Zygote(folder)
        self._made: dict[Shape, tuple[Path, Finished, list[tuple[str, str]]]] = {}

    def store(self, shape: Shape = SCORE) -> Path:
        """Return a new store: empty, or a copy of a trained one for stages after training and for rebuilds."""
        self.stores += 1
        store = self.folder / f"store-{self.stores}"
        done = (
            TRAIN if shape.until == Stage.REGISTER else replace(shape, rebuild=None, key="") if shape.rebuild else None
        )
        if done:
            self.expected(done)
            shutil.copytree(self._made[done][0], store)
        return store

    def start(
        self, store: Path | str, shape: Shape = SCORE, fault: Fault | None = None, aws: dict | None = None,
        home: Path | None = None,
    ) -> Running:  # fmt: skip
        """Start a run. `home` stands for another machine, without shared work folders."""
        job = dict(store=str(store), source=str(self.source), mlflow=self.mlflow, shape=asdict(shape))
        variables = {MARK: str(store)} | (aws or {}) | (fault.variables() if fault else {})
        return self.zygote.fork(job, variables | ({"HOME": str(home)} if home else {}))

    def expected(self, shape: Shape) -> Finished:
        """Return the result of an undisturbed run, whose operations are counted."""
        if shape not in self._made:
            store = self.store(shape)
            fault = Fault(str(store), str(self.folder / f"points-{store.name}"))
            running = self.start(store, shape, fault)
            assert running.wait() == 0, running.said()
            finished, wrong = verify_store.finished(Storage(str(store)))
            assert not wrong and self.left(store) == 0
            self._made[shape] = store, finished, fault.counted()
        return self._made[shape][1]

    def points(self, role: str, shape: Shape) -> list[str]:
        """Return the operations on the store by a process of this role, in order, at which a fault may occur."""
        self.expected(shape)
        return [where for who, where in self._made[shape][2] if who == role]

    def left(self, store: Path | str, patience: float = 5.0) -> int:
        """Return the processes of a store's runs that still exist a moment after their parent's end."""
        deadline = time.monotonic() + patience
        while (found := processes_with_variable(MARK, str(store))) and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in found:  # otherwise nobody would know which process it was
            print("left:", process, command_line(process))
        return len(found)

    def disturbed(
        self, kind: str, store: Path | str, disturb: Callable[[], tuple[int, list[str]]], shape: Shape = SCORE,
        aws: dict[str, str] | None = None, again: Callable[[], Running] | None = None, expected: Finished | None = None,
    ) -> Seen:  # fmt: skip
        """Run a command with a fault and again without one (`again`), and judge both.

        `disturb` gives the exit code and where the fault came ("operation path"; none: it did not come).
        """
        expected, began = expected or self.expected(shape), time.monotonic()
        again = again or (lambda: self.start(store, shape, aws=aws))
        code, fired = disturb()
        assert fired, f"{kind}: the fault never came"
        left = self.left(store)
        outcome = "killed" if code == -signal.SIGKILL else "went on" if code == 0 else "failed"
        assert code in (-signal.SIGKILL, 0, 1), f"{kind} at {fired[0]}: exit code {code}: {self._said()}"
        if code:
            running = again()
            code = running.wait()
            assert code == 0, f"after {kind} at {fired[0]}: {running.said()}"
        with environment(aws or {}):
            verdict = verify_store.compare(expected, Storage(str(store)))
        left += self.left(store)
        seen = Seen(
            kind, stage_of(fired[0]), fired[0], "SIGKILL" in kind, outcome, code == 0,
            time.monotonic() - began, verdict, left,
        )  # fmt: skip
        self.seen.append(seen)
        if not isinstance(store, str):
            shutil.rmtree(store, ignore_errors=True)
        return seen

    def _said(self) -> str:
        return self.zygote.known[self.zygote.number].said() if self.zygote.number else ""

    def close(self) -> None:
        self.zygote.close()


def stage_of(where: str) -> str:
    """Return the stage in whose folder (or work folder) a fault occurred."""
    path = where.split(" ", 1)[1].removeprefix(f"/{BUCKET}/")
    parts = [part for part in path.split("/") if not part.startswith("store-")]
    name = parts[1] if parts[0] == ".work" and len(parts) > 1 else parts[0]
    return name.split("-")[0] or "listing"


def started(store: Path | str, module: str) -> list[int]:
    """Return the ids of the child processes of a store's runs that run a module."""
    processes = processes_with_variable(MARK, str(store))
    return sorted(process.pid for process in processes if module in command_line(process))


def until(condition: Callable[[], object], what: str, seconds: float = LIMIT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def told(seen: list[Seen]) -> list[dict]:
    return [asdict(one) for one in seen]


def _test() -> str:
    """Return the name of the running test, with parameters and without phase."""
    return os.environ.get("PYTEST_CURRENT_TEST", "").split("::")[-1].rpartition(" ")[0]


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
