"""Ports stay free until a server has started."""

import socket

import pytest

from masters.infra import object_store, ports

RAY_WORKERS = range(10_002, 20_000)


def test_ports_are_free_different_and_not_ephemeral() -> None:
    found = [*ports.free_ports(50), *object_store.listener_ports().values()]
    assert len(set(found[:50])) == 50 and len(set(found[50:])) == len(found[50:])
    assert not set(found[:50]) & set(ports.ephemeral_ports())
    for port in found:
        assert port not in RAY_WORKERS
        with socket.socket() as server:
            server.bind(("127.0.0.1", port))


def test_ephemeral_ports_are_used_if_there_are_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "ephemeral_ports", lambda: range(1024, 65_536))
    assert len(set(ports.free_ports(5))) == 5 and object_store.listener_ports()


def test_a_used_port_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    [port] = ports.free_ports(1)
    monkeypatch.setattr(ports, "PORTS", range(port, port + 1))
    assert ports.free_ports(1) == [port]
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", port))
        with pytest.raises(OSError, match="expected 1 free ports, found 0"):
            ports.free_ports(1)
