"""Free ports on loopback for servers that need seconds until they bind them."""

import random
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

LOWEST, HIGHEST = 12_000, 65_535
RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int, suits: Callable[[int], bool] = lambda port: True) -> list[int]:
    """`count` different ports that are free now and suit. Raises OSError if there are fewer.

    None of them is one that the kernel gives to outgoing connections: such a port is soon taken by anybody's.
    """
    first, last = map(int, RANGE.read_text().split()) if RANGE.exists() else (32_768, 60_999)
    possible = [port for port in range(LOWEST, HIGHEST + 1) if not first <= port <= last]
    found: list[int] = []
    for port in random.sample(possible, len(possible)):
        if len(found) == count:
            return found
        if is_free(port) and suits(port):
            found.append(port)
    raise OSError(f"expected {count} free ports outside {first} to {last}, found {len(found)}")


def is_free(port: int) -> bool:
    if not 0 < port <= HIGHEST:
        return False
    with socket.socket() as probe, suppress(OSError):
        probe.bind(("127.0.0.1", port))
        return True
    return False
