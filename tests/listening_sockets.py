"""The sockets on which processes listen, from /proc: every TCP and UDP socket that others could reach."""

from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

LISTEN = "0A"
Address = tuple[str, int]


def sockets() -> dict[str, Address]:
    """Return (address, port) of every listening TCP socket and bound UDP socket of this machine, by inode."""
    found = {}
    for kind in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]:
            parts = line.split()
            if parts[3] == LISTEN if kind.startswith("tcp") else parts[2].endswith(":0000"):
                found[parts[9]] = _address(parts[1])
    return found


def addresses(pids: set[int], among: dict[str, Address] | None = None) -> set[Address]:
    """Return the addresses of these processes' sockets."""
    known = sockets() if among is None else among
    return {known[inode] for pid in pids for inode in _inodes(pid) if inode in known}


def reachable(pids: set[int], among: dict[str, Address] | None = None) -> set[Address]:
    """Return the addresses that are not on loopback."""
    return {(address, port) for address, port in addresses(pids, among) if not _is_loopback(address)}


def _is_loopback(address: str) -> bool:
    found = ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def _inodes(pid: int) -> set[str]:
    found = set()
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                target = str(link.readlink())
                if target.startswith("socket:["):
                    found.add(target[8:-1])
    return found


def _address(text: str) -> Address:
    host, port = text.split(":")
    words = b"".join(bytes.fromhex(host[at : at + 8])[::-1] for at in range(0, len(host), 8))
    return str(ip_address(words)), int(port, 16)
