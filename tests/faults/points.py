"""Faults inside a process, at the N-th thing that it does to files below a folder. Test code: nothing of it is shipped.

A process reads what is to happen from MASTERS_FAULT (JSON, see `Fault`). What it did, and the fault when it came, is
appended to `log`, a line each: "did" or "fault", the role, the operation and the path below the root.
"""

import builtins
import errno
import json
import os
import pathlib
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

VARIABLE = "MASTERS_FAULT"
ROLES = {"train_worker": "trainer", "engine_worker": "engine", "masters.cli": "flow"}


@dataclass(frozen=True)
class Fault:
    """`what`: "none" (only count), "kill", "full" (no space from then on), "readonly" (from then on), "clock".

    `how`: "before" the operation, in the middle of its bytes ("half"), or "after" it, before the process knows.
    """

    root: str
    log: str
    role: str = "flow"
    what: str = "none"
    at: int = 0
    how: str = "before"
    jump: float = 0.0  # seconds that the clock is set forward, or back

    def variables(self) -> dict[str, str]:
        """For the environment of a process, and of its children."""
        site = str(pathlib.Path(__file__).parent / "site")
        return {VARIABLE: json.dumps(asdict(self)), "PYTHONPATH": f"{site}:{pathlib.Path(__file__).parents[2]}"}


def install(role: str | None = None) -> None:
    """Take part in the fault that the environment names, if this process has its role."""
    fault = Fault(**json.loads(os.environ[VARIABLE]))
    role = role or next((role for word, role in ROLES.items() if any(word in a for a in sys.orig_argv)), None)
    if role and fault.role in (role, "any"):
        _Points(fault, role).wrap()


class _Points:
    def __init__(self, fault: Fault, role: str) -> None:
        self.fault, self.role, self.done = fault, role, 0
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
        """`real`, with the fault where it is due. `place`: the argument that says which file is made or goes."""

        def wrapped(*args, **named):
            path = os.fspath(args[place]) if len(args) > place else ""
            if not isinstance(path, str) or not path.startswith(self.root):
                return real(*args, **named)
            self.done += 1
            fault, shown = self.fault, path[len(self.root) :]
            if fault.what == "none" or self.done < fault.at:
                if fault.what == "none":
                    self._say("did", name, shown)
                return real(*args, **named)
            if self.done == fault.at:
                self._say("fault", name, shown)
            if fault.what == "kill":
                if fault.how == "half" and half:
                    half(*args)
                elif fault.how == "after":
                    real(*args, **named)
                os.kill(os.getpid(), signal.SIGKILL)
            return self._lasting(name, half, real, args, named)

        return wrapped

    def _lasting(self, name: str, half: Callable | None, real: Callable, args: tuple, named: dict):
        """A disk without room, a store that no longer lets write, a clock that was set."""
        if self.fault.what == "clock" and self.done == self.fault.at:
            now = time.time
            time.time = lambda: now() + self.fault.jump
        if self.fault.what == "full" and name in ("write", "copy", "report"):
            if half:
                half(*args)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
        if self.fault.what == "readonly":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))
        return real(*args, **named)

    def _say(self, what: str, name: str, path: str) -> None:
        line = f"{what}\t{self.role}\t{name}\t{path}\n".encode()
        file = os.open(self.fault.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, line)
        os.close(file)


def _half_copied(source: str, target: str) -> None:
    data = pathlib.Path(source).read_bytes()
    with open(target, "wb") as file:
        file.write(data[: len(data) // 2])
