"""Runs a Python program as the interpreter would, but forked from `tests.fork_server.server` where that is possible.

`python -I -S client.py -m MODULE ARGUMENTS`. Signals that ask a process to end are passed on; the program's exit code,
or the signal that ended it, becomes this process's own. Programs that the server is not meant for, and those whose
environment differs from the server's in what libraries read when they are imported, run in the real interpreter.

Imports only the standard library, so that it starts in 20 ms.
"""

import ctypes
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import NoReturn

FOLDER = os.environ.get("FORK_SERVER", "")  # holds the session's environment, the server's socket and its log
COMMANDS = ("masters.cli", "tests.fork_server.call")
CHILDREN = (
    "masters.models.generation.worker",
    "masters.models.judging.worker",
    "masters.models.training.worker",
    "masters.checks.parity_worker",
)
READ_AT_IMPORT = ("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE")  # by libraries
PASSED_ON = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
START_SECONDS = 300
PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> NoReturn:
    with open(f"{FOLDER}/session.json", encoding="utf-8") as file:
        session = json.load(file)
    same = all(os.environ.get(name) == session["environment"].get(name) for name in READ_AT_IMPORT)
    if not same or not forkable(arguments):
        os.execv(session["python"], [session["python"], *arguments])
    if arguments[1] == "masters.execution.child_process":
        die_with_parent(int(arguments[2]))
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    ignored = [number for number in PASSED_ON if signal.getsignal(number) == signal.SIG_IGN]
    server = connected(session)
    request = dict(arguments=arguments, cwd=os.getcwd(), environment=dict(os.environ), ignored=ignored)
    data = json.dumps(request).encode()
    socket.send_fds(server, [b"%8d" % len(data)], [0, 1, 2])
    server.sendall(data)
    answers = server.makefile("rb")
    pid = int(answers.readline())
    for number in PASSED_ON.difference(ignored):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    end(int(answers.readline()))


def forkable(arguments: list[str]) -> bool:
    if len(arguments) < 2 or arguments[0] != "-m":
        return False
    if arguments[1] == "masters.execution.child_process":
        return arguments[3] in CHILDREN
    return arguments[1] in COMMANDS


def die_with_parent(parent: int) -> None:
    """End with the parent, as a process that `masters.execution.child_process` starts does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the parent is gone")


def connected(session: dict) -> socket.socket:
    """Return a connection to the session's server, which the first client starts."""
    with open(f"{FOLDER}/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        server = _connect()
        if server is None:
            process, ends = _start(session), time.monotonic() + START_SECONDS
            while (server := _connect()) is None:
                if process.poll() is not None or time.monotonic() > ends:
                    sys.exit(f"the tests' fork server did not start: see {FOLDER}/log")
                time.sleep(0.05)
    return server


def _connect() -> socket.socket | None:
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(f"{FOLDER}/socket")
    except (FileNotFoundError, ConnectionRefusedError):
        server.close()
        return None
    return server


def _start(session: dict) -> subprocess.Popen:
    command = [session["python"], "-m", "tests.fork_server.server", f"{FOLDER}/socket", str(session["owner"])]
    # Arrow's allocator would start a thread when it is imported; OpenMP reads its policy then, which trainers set
    own = {"JE_ARROW_MALLOC_CONF": "background_thread:false", "OMP_WAIT_POLICY": "PASSIVE"}
    environment = session["environment"] | own
    with open(f"{FOLDER}/log", "ab") as log:
        return subprocess.Popen(
            command, cwd=session["root"], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True, preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON),
        )  # fmt: skip


def end(code: int) -> NoReturn:
    """Exit with this code, or by the signal -code."""
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
