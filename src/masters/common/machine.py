"""This machine: its cache folder, which of its processes still run, and how much memory is free.

Memory is counted as Linux does: resident pages, shared ones included.
"""

import os
import re
import socket
from contextlib import suppress
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import psutil

from masters.common.errors import InputError

CGROUP = Path("/sys/fs/cgroup")
CGROUP_FILES = (  # version 2, then 1: the limit, the usage, and the entry of memory.stat that can be reclaimed
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
CACHE = "MASTERS_CACHE"  # environment variable: the cache folder
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def cache_folder() -> Path:
    """Return the user's folder for notes and locks, and for local copies of stores that lie elsewhere."""
    return user_folder(CACHE, ".cache/masters")


def user_folder(setting: str, default: str) -> Path:
    """Return the folder that the environment variable `setting` names, else `default` in the home folder; absolute.

    "~" is the home folder. Raises InputError if that is needed and unknown.
    """
    try:
        return Path(os.environ.get(setting) or f"~/{default}").expanduser().absolute()
    except RuntimeError:  # HOME is not set, and the system does not know this user
        raise InputError(
            f"this user has no home folder: set HOME or {setting} to a folder that can be written"
        ) from None


def this_process() -> str:
    """Return a unique name of the running process: host, boot id, process id, start time and process id namespace."""
    pid = os.getpid()
    return f"{socket.gethostname()} {_boot_id()} {pid} {_start_ticks(pid)} {_pid_namespace()}"


def has_ended(process: str) -> bool | None:
    """Return whether the process that `this_process` named has ended.

    Returns None if it ran on another machine or in another container, where this process cannot see it.
    """
    host, boot, pid, started, namespace = (process.split(" ") + [""] * 5)[:5]
    if host != socket.gethostname() or (boot == _boot_id() and namespace not in ("", _pid_namespace())):
        return None
    return boot != _boot_id() or not pid.isdigit() or str(_start_ticks(int(pid))) != started


def process_birth(pid: int) -> str | None:
    """Return boot id and start time of a process, None if it has ended or is a zombie.

    The process id alone names nothing: the kernel gives it to another process later.
    """
    started = _start_ticks(pid)
    return None if started is None else f"{_boot_id()}:{started}"


def _start_ticks(pid: int) -> int | None:
    """Return the clock ticks from boot to the start of a process, which stay when the clock is set."""
    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        return round((process.create_time() - psutil.boot_time()) * TICKS_PER_SECOND)
    except psutil.NoSuchProcess:
        return None


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _pid_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def peak_memory_mib() -> float:
    """Return this process's peak resident memory, since its start or `reset_peak_memory`; children do not count."""
    # psutil has no peak, and ru_maxrss begins with the peak of the parent process
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return (int(peak.group(1)) if peak else getrusage(RUSAGE_SELF).ru_maxrss) / 1024


def reset_peak_memory() -> None:
    """Reset the peak to the memory held now. Does nothing where the kernel does not offer that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def available_memory() -> int:
    """Return the bytes that can still be allocated, within the limit of the container (control groups)."""
    free = [psutil.virtual_memory().available]
    for limit, usage, reclaimable in CGROUP_FILES:
        with suppress(OSError, ValueError):  # no such group, or "max"
            cached = re.search(rf"^{reclaimable} (\d+)", (CGROUP / limit).with_name("memory.stat").read_text(), re.M)
            used = int((CGROUP / usage).read_text()) - (int(cached.group(1)) if cached else 0)
            free.append(int((CGROUP / limit).read_text()) - used)
    return max(0, min(free))
