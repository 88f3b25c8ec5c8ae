"""How much memory a process held at its peak, as Linux counts it: resident pages, shared ones too."""

import re
from contextlib import suppress
from pathlib import Path
from resource import RUSAGE_SELF, getrusage


def peak_mib() -> float:
    """This process's peak so far, or since `forget_peak`; processes that it started are not in it."""
    # not ru_maxrss: that begins with the peak of whoever started the process
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return (int(found.group(1)) if found else getrusage(RUSAGE_SELF).ru_maxrss) / 1024


def forget_peak() -> None:
    """Let the peak begin anew at what is held now. Where the kernel does not offer that, it goes on."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
