"""Finds free ports on loopback for servers that take seconds to bind them."""

import random
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

PORTS = range(20_000, 65_536)  # above the default ports of Ray's workers, 10002 to 19999
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int, is_suitable: Callable[[int], bool] = lambda port: True) -> list[int]:
    """Return `count` different ports that are free and suitable. Raises OSError if there are fewer.

    The kernel's ephemeral ports come last, because an outgoing connection may take one before the server binds it.
    """
    found: list[int] = []
    for port in sorted(random.sample(PORTS, len(PORTS)), key=ephemeral_ports().__contains__):
        if is_free(port) and is_suitable(port):
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"expected {count} free ports, found {len(found)}")


def is_free(port: int) -> bool:
    """Return whether a port in `PORTS` can be bound on loopback."""
    if port not in PORTS:
        return False
    with socket.socket() as probe, suppress(OSError):
        probe.bind(("127.0.0.1", port))
        return True
    return False


@cache
def ephemeral_ports() -> range:
    """Return the ports that the kernel uses for outgoing connections."""
    first, last = map(int, EPHEMERAL.read_text().split()) if EPHEMERAL.exists() else (32_768, 60_999)
    return range(first, last + 1)
