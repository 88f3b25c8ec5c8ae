"""Faults inside a process, at its N-th operation on files below a folder. Test code, not part of the package.

A process reads what is to happen from MASTERS_FAULT (JSON, see `Fault`). What it did, and the fault when it came, is
appended to `log`, a line each: "did" or "fault", the role, the operation and the path below the root.
"""

import builtins
import errno
import itertools
import json
import os
import pathlib
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, tzinfo

VARIABLE = "MASTERS_FAULT"
HOWS = ("before", "half", "after")
# the first word that a command line holds; a forked pipeline says itself that it is the flow
ROLES = {
    "rank-1.json": "second trainer", "training.worker": "trainer", "generation.worker": "engine",
    "judging.worker": "judge", "masters.cli": "flow",
}  # fmt: skip


@dataclass(frozen=True)
class At:
    """A fault at the operation number `at` of a process of this role.

    `what`: "kill", "kill the parent", "full" (no space from then on), "readonly" (from then on), "clock". `how`:
    "before" the operation, in the middle of its bytes ("half"), or "after" it, before the process knows.
    """

    role: str
    what: str
    at: int
    how: str = "before"
    jump: float = 0.0  # seconds that the clock is set forward, or back


@dataclass(frozen=True)
class Fault:
    """`plan`: in order, the first for a role's first process, the next for the process after it. Empty: only count."""

    root: str
    log: str
    plan: tuple[At, ...] = ()

    def variables(self) -> dict[str, str]:
        """Return environment variables for a process and its children."""
        site = str(pathlib.Path(__file__).parent / "site")
        return {VARIABLE: json.dumps(asdict(self)), "PYTHONPATH": f"{site}:{pathlib.Path(__file__).parents[2]}"}

    def fired(self) -> list[tuple[str, str]]:
        """Return role and "operation path" of the faults that occurred."""
        return [(role, where) for what, role, where in self._lines() if what == "fault"]

    def counted(self) -> list[tuple[str, str]]:
        """Return role and "operation path" of all operations of an undisturbed run."""
        return [(role, where) for what, role, where in self._lines() if what == "did"]

    def _lines(self) -> list[tuple[str, str, str]]:
        log = pathlib.Path(self.log)
        lines = [line.split("\t") for line in log.read_text().splitlines()] if log.exists() else []
        return [(what, role, f"{operation} {path}") for what, role, operation, path in lines]


def install(role: str | None = None) -> None:
    """Install the fault that the environment names, if this process has a role in it."""
    told = json.loads(os.environ[VARIABLE])
    fault = Fault(told["root"], told["log"], tuple(At(**at) for at in told["plan"]))
    role = role or next((role for word, role in ROLES.items() if any(word in a for a in sys.orig_argv)), None)
    mine = [at for at in fault.plan if at.role == role]
    came = sum(who == role for who, _ in fault.fired())
    if role and (not fault.plan or came < len(mine)):
        _Points(fault, role, mine[came] if mine else None).wrap()


class _Points:
    def __init__(self, fault: Fault, role: str, at: At | None) -> None:
        self.fault, self.role, self.at = fault, role, at
        self.numbers = itertools.count(1)  # threads that do something at once get one each
        self.root = str(pathlib.Path(fault.root)) + "/"

    def wrap(self) -> None:
        write_bytes, write_text, copyfile = pathlib.Path.write_bytes, pathlib.Path.write_text, shutil.copyfile
        pathlib.Path.write_bytes = self._point("write", write_bytes, lambda p, d: write_bytes(p, d[: len(d) // 2]))
        pathlib.Path.write_text = self._point("write", write_text, lambda p, d: write_text(p, d[: len(d) // 2]))
        shutil.copyfile = self._point("copy", copyfile, _half_copied, 1)
        for module, name, place in ((os, "replace", 1), (os, "link", 1), (os, "unlink", 0), (os, "remove", 0)):
            setattr(module, name, self._point(name, getattr(module, name), None, place))
        real = builtins.open

        def opened(file, mode="r", *rest, **named):
            report = isinstance(file, str | os.PathLike) and mode == "a" and str(file).endswith(".progress")
            return (self._point("report", real, None) if report else real)(file, mode, *rest, **named)

        builtins.open = opened

    def _point(self, name: str, real: Callable, half: Callable | None, place: int = 0) -> Callable:
        """Wrap `real` with the fault. `place` is the index of the argument with the file's path."""

        def wrapped(*args, **named):
            path = os.fspath(args[place]) if len(args) > place else ""
            if not isinstance(path, str) or not path.startswith(self.root):
                return real(*args, **named)
            number = next(self.numbers)
            if self.at is None:
                self._say("did", name, path[len(self.root) :])
            if self.at is None or number < self.at.at:
                return real(*args, **named)
            if number == self.at.at:
                self._say("fault", name, path[len(self.root) :])
            if self.at.what.startswith("kill"):
                if self.at.how == "half" and half:
                    half(*args)
                elif self.at.how == "after":
                    real(*args, **named)
                _end(self.at.what)
            if self.at.what == "clock" and number == self.at.at:
                _set_clock(self.at.jump)
            return self._lasting(self.at, name, half, real, args, named)

        return wrapped

    def _lasting(self, at: At, name: str, half: Callable | None, real: Callable, args: tuple, named: dict):
        """Raise the error of a full disk, or of a store that became read-only."""
        if at.what == "full" and name in ("write", "copy", "report"):
            if half:
                half(*args)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
        if at.what == "readonly":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))
        return real(*args, **named)

    def _say(self, what: str, name: str, path: str) -> None:
        line = f"{what}\t{self.role}\t{name}\t{path}\n".encode()
        file = os.open(self.fault.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, line)
        os.close(file)


def _end(what: str) -> None:
    """Kill this process, or its parent: the kernel then ends this one too."""
    os.kill(os.getpid() if what == "kill" else os.getppid(), signal.SIGKILL)
    time.sleep(60)


def _set_clock(jump: float) -> None:
    """Change the time of day that this process reads. The monotonic clock stays."""
    now, now_ns, real = time.time, time.time_ns, datetime
    time.time = lambda: now() + jump
    time.time_ns = lambda: now_ns() + int(jump * 1e9)

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None):
            return real.now(tz) + timedelta(seconds=jump)

    for name, module in list(sys.modules.items()):
        if name.startswith("masters.") and getattr(module, "datetime", None) is real:
            module.__dict__["datetime"] = Shifted


def _half_copied(source: str, target: str) -> None:
    data = pathlib.Path(source).read_bytes()
    with open(target, "wb") as file:
        file.write(data[: len(data) // 2])
