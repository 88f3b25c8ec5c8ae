"""A child process that holds as many MiB as its job says; a small one, without PyTorch."""

import json
from pathlib import Path

from masters.execution import child_process


def hold(job_file: Path) -> None:
    held = bytearray(json.loads(job_file.read_text())["mib"] << 20)
    child_process.report(job_file, event="held", mib=len(held) >> 20)


if __name__ == "__main__":
    child_process.child_main(hold)
