"""Ports that nobody else takes while a server imports."""

import socket

import pytest

from masters.infra import ports


def test_ports_are_free_different_and_none_that_outgoing_connections_get() -> None:
    first, last = map(int, ports.RANGE.read_text().split())
    found = ports.free_ports(50)
    assert len(set(found)) == 50
    for port in found:
        assert not first <= port <= last
        with socket.socket() as server:
            server.bind(("127.0.0.1", port))


def test_a_port_in_use_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    [port, other] = ports.free_ports(2)
    monkeypatch.setattr(ports, "LOWEST", min(port, other))
    monkeypatch.setattr(ports, "HIGHEST", max(port, other))
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", port))
        assert ports.free_ports(1, lambda one: one in (port, other)) == [other]
        with pytest.raises(OSError, match="expected 2 free ports"):
            ports.free_ports(2, lambda one: one in (port, other))
