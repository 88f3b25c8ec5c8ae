"""Starts the tests' Python programs by forking one process that has imported vLLM, PyTorch and MLflow.

Importing them takes an engine 11 s of CPU, a trainer 6 s and a command 5 s; a fork takes milliseconds. The clients are
`tests/fork_server/client.py`: each hands over its arguments, environment, working directory and standard streams, and
waits for the exit code. A client's end is the end of its program, so that killing it or its parent works as usual.

Forking is sound only as long as this process has one thread and no CUDA context: `fork` copies the calling thread
alone, so a lock that another thread holds would stay locked in the child for ever, and a CUDA context cannot be used
after a fork. Therefore nothing but imports happens here, and the number of threads is checked before the first fork.
What reads its settings when it is imported is left to the children: Prefect, and Ray's driver, which is not forked.

Usage: `python -m tests.fork_server.server SOCKET OWNER_PID`. Ends when the owner has ended.
"""

import atexit
import ctypes
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from tests.fork_server.client import PASSED_ON, PR_SET_PDEATHSIG, end

FDS = 3  # stdin, stdout, stderr


def preload() -> dict[str, str]:
    """Import what engines, trainers and commands import. Returns the variables that they set: children need them."""
    before = dict(os.environ)
    import masters.models.generation.engine  # noqa: F401, I001  # sets what vLLM reads when it is imported
    import matplotlib.pyplot  # noqa: F401
    import mlflow.tracking  # noqa: F401
    import vllm.v1.engine.llm_engine  # noqa: F401
    from vllm import LLM, SamplingParams  # noqa: F401
    from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: F401

    import masters.models.training.trainer  # noqa: F401
    import masters.checks.preflight  # noqa: F401

    return {name: value for name, value in os.environ.items() if before.get(name) != value}


class Server:
    """Accepts clients on a Unix socket, one program each."""

    def __init__(self, path: str, variables: dict[str, str]) -> None:
        self._variables = variables
        self._clients: dict[int, socket.socket] = {}  # by pid
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(64)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def watch(self, owner: int) -> None:
        """Serve until the process `owner` ends."""
        pidfd = os.pidfd_open(owner)
        self._selector.register(pidfd, selectors.EVENT_READ, None)
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                key.data()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            request, fds = _receive(client)
        except (OSError, ValueError):  # the client was killed meanwhile
            client.close()
            return
        pid = os.fork()
        if pid == 0:
            self._selector.close()
            self._listener.close()
            for other in (*self._clients.values(), client):
                other.close()
            _run(request, fds, self._variables)
        for fd in fds:
            os.close(fd)
        self._clients[pid] = client
        pidfd = os.pidfd_open(pid)
        self._selector.register(pidfd, selectors.EVENT_READ, lambda: self._ended(pid, pidfd))
        self._selector.register(client, selectors.EVENT_READ, lambda: self._client_gone(pid))
        _send(client, pid)

    def _ended(self, pid: int, pidfd: int) -> None:
        _, status = os.waitpid(pid, 0)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        client = self._clients.pop(pid)
        if client in self._selector.get_map():
            self._selector.unregister(client)
        _send(client, os.waitstatus_to_exitcode(status))
        client.close()

    def _client_gone(self, pid: int) -> None:
        self._selector.unregister(self._clients[pid])
        os.kill(pid, signal.SIGKILL)  # not yet waited for, so the pid is still this program's


def _receive(client: socket.socket) -> tuple[dict, list[int]]:
    """Return the program to run, and its standard streams."""
    head, fds, _, _ = socket.recv_fds(client, 8, FDS)
    size, data = int(head), b""
    while len(data) < size:
        part = client.recv(size - len(data))
        if not part:
            raise ValueError("the request is cut short")
        data += part
    return json.loads(data), fds


def _send(client: socket.socket, number: int) -> None:
    with suppress(OSError):  # the client is gone
        client.sendall(f"{number}\n".encode())


def _run(request: dict, fds: list[int], variables: dict[str, str]) -> NoReturn:
    """Become the program in the child, and end as the interpreter would."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    for number in PASSED_ON:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else default)
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
        os.close(fd)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(variables | request["environment"])
    sys.path[0] = request["cwd"]
    np.random.seed()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # else read when OpenMP is loaded
    try:
        _customize()
        _main(request["arguments"])
        code: object = 0
    except SystemExit as exit:
        code = exit.code
    except BaseException as error:
        traceback.print_exc()
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    end(code if isinstance(code, int) else 0 if code is None else 1)


def _customize() -> None:
    """Do what the interpreter does at its start with PYTHONPATH."""
    for folder in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        sys.path.insert(1, folder)
        if (file := Path(folder, "sitecustomize.py")).exists():
            runpy.run_path(str(file))


def _main(arguments: list[str]) -> None:
    """Run `-m MODULE ARGUMENTS`; of `masters.execution.child_process` the module that it would run."""
    sys.orig_argv = [sys.executable, *arguments]
    _, module, *rest = arguments
    if module == "masters.execution.child_process":
        _, module, *rest = rest
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main(path: str, owner: str) -> None:
    variables = preload()
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(f"expected one thread before the first fork, found {threads}: an import starts others")
    gc.collect()
    gc.freeze()  # the children share the pages of what is there
    Server(path, variables).watch(int(owner))


if __name__ == "__main__":
    main(*sys.argv[1:])
