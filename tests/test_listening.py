"""Processes of the project listen on loopback only, and the check of it notices others."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from masters.execution.processes import LOOPBACK
from tests.listening_sockets import addresses, reachable


@pytest.mark.parametrize(
    ("family", "address", "reached"),
    [
        (socket.AF_INET, "127.0.0.1", False), (socket.AF_INET, "127.9.9.9", False), (socket.AF_INET, "0.0.0.0", True),
        (socket.AF_INET6, "::1", False), (socket.AF_INET6, "::", True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_sockets_are_seen(family: int, address: str, reached: bool, kind: int) -> None:
    with socket.socket(family, kind) as listener:
        try:
            listener.bind((address, 0))
        except OSError:
            pytest.skip("no IPv6 here")
        if kind == socket.SOCK_STREAM:
            listener.listen()
        mine = (address, listener.getsockname()[1])
        assert mine in addresses({os.getpid()})
        assert (mine in reachable({os.getpid()})) == reached


RANK = """
import os, sys, time
import torch.distributed as dist
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
dist.barrier()
print("met", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_ranks_that_met_listen_on_loopback(tmp_path: Path) -> None:
    """Child processes listen on loopback only, whether or not the machine has a network."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path / "meeting"), str(rank)],
            env=os.environ | LOOPBACK, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        assert [rank.stdout.readline() for rank in ranks if rank.stdout] == ["met\n"] * 2
        pids = {rank.pid for rank in ranks}
        assert addresses(pids) and reachable(pids) == set()
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.slow
def test_the_embedded_prefect_server_listens_on_loopback(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "masters.infra.prefect_server", str(port), str(os.getpid())],
        env=os.environ | {"PREFECT_HOME": str(tmp_path)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 900
        while ("127.0.0.1", port) not in addresses({server.pid}):
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        assert reachable({server.pid}) == set()
    finally:
        server.kill()
        server.wait()
