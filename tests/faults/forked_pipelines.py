"""Starts pipelines as separate processes without import time: imports everything once and forks.

`python -m tests.faults.forked_pipelines` reads a job a line (JSON: id, folder of its log, environment, arguments of
`tests.faults.pipeline.main`), answers {"id", "pid"}, and when the process has ended {"id", "code"}.
"""

import json
import os
import select
import sys

from tests.faults import fault_points, pipeline


def main() -> None:
    running, data = {}, b""
    while True:
        if select.select([0], [], [], 0.02)[0]:
            read = os.read(0, 1 << 16)
            if not read:
                return
            data += read
            *lines, data = data.split(b"\n")
            for line in lines:
                order = json.loads(line)
                pid = _forked(order)
                running[pid] = order["id"]
                _say(id=order["id"], pid=pid)
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                _say(id=running.pop(pid), code=os.waitstatus_to_exitcode(status))


def _forked(order: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(order["environment"])
    code = 70
    try:
        if fault_points.VARIABLE in os.environ:
            fault_points.install("flow")
        code = pipeline.main(**order["job"])
    finally:
        sys.stderr.flush()
        os._exit(code)


def _say(**line: object) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
