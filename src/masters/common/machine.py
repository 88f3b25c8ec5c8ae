"""This machine: where it keeps what is its own, which of its processes still run, and how much memory there is.

Memory is counted as Linux does: resident pages, shared ones too.
"""

import os
import re
import socket
from contextlib import suppress
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

CGROUP = Path("/sys/fs/cgroup")
GROUPS = (  # a limit, what is used of it, and what of that can be taken back
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)


def cache() -> Path:
    """Where this machine keeps what it needs of a store that is elsewhere."""
    return Path.home() / ".cache" / "masters"


def this_process() -> str:
    """Names the running process for good: host, boot, process id, when it started, and whose process ids these are."""
    return f"{_named(os.getpid())} {_namespace()}"


def ended(process: str) -> bool | None:
    """Whether a process that `this_process` named is gone; None if it runs, or ran, on another machine or in another
    container."""
    host, boot, pid, started, namespace = (process.split(" ") + [""] * 5)[:5]
    if host != socket.gethostname() or (boot == _boot() and namespace not in ("", _namespace())):
        return None
    return boot != _boot() or not pid.isdigit() or _named(int(pid)) != f"{host} {boot} {pid} {started}"


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def _named(pid: int) -> str:
    try:
        started = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        started = "gone"
    return f"{socket.gethostname()} {_boot()} {pid} {started}"


def peak_mib() -> float:
    """This process's peak so far, or since `forget_peak`; processes that it started are not in it."""
    # not ru_maxrss: that begins with the peak of whoever started the process
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return (int(found.group(1)) if found else getrusage(RUSAGE_SELF).ru_maxrss) / 1024


def forget_peak() -> None:
    """Let the peak begin anew at what is held now. Where the kernel does not offer that, it goes on."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def available() -> int:
    """Bytes that this machine can still give, within what the container (control groups, version 2 or 1) may take."""
    found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    free = [int(found.group(1)) * 1024] if found else []
    for limit, used, reclaimable in GROUPS:
        with suppress(OSError, ValueError):  # no such group, or "max"
            cached = re.search(rf"^{reclaimable} (\d+)", (CGROUP / limit).with_name("memory.stat").read_text(), re.M)
            taken = int((CGROUP / used).read_text()) - (int(cached.group(1)) if cached else 0)
            free.append(int((CGROUP / limit).read_text()) - taken)
    return max(0, min(free)) if free else 0
