"""Free ports on loopback for servers that need seconds until they bind them."""

import random
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

PORTS = range(20_000, 65_536)  # above those that Ray's workers take by default, 10002 to 19999
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int, suits: Callable[[int], bool] = lambda port: True) -> list[int]:
    """`count` different ports that are free and suit. Raises OSError if there are fewer.

    Those that the kernel gives to outgoing connections come last: such a port may be taken before a server binds it.
    """
    found: list[int] = []
    for port in sorted(random.sample(PORTS, len(PORTS)), key=ephemeral().__contains__):
        if is_free(port) and suits(port):
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"expected {count} free ports, found {len(found)}")


def is_free(port: int) -> bool:
    if port not in PORTS:
        return False
    with socket.socket() as probe, suppress(OSError):
        probe.bind(("127.0.0.1", port))
        return True
    return False


@cache
def ephemeral() -> range:
    """The ports that the kernel gives to outgoing connections."""
    first, last = map(int, EPHEMERAL.read_text().split()) if EPHEMERAL.exists() else (32_768, 60_999)
    return range(first, last + 1)
