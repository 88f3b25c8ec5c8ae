"""Find running processes by their environment."""

from contextlib import suppress

import psutil


def processes_with_variable(name: str, value: str) -> list[psutil.Process]:
    """Return the processes, without zombies, whose environment has a variable with this value."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # gone meanwhile, or another user's
            if process.environ().get(name) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def command_line(process: psutil.Process) -> str:
    """Return the command line of a process, empty if the process is gone."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
