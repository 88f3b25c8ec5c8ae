"""Leases let one run at a time build an artifact in a shared store. Threads stand in for machines."""

import json
import threading
import time
from pathlib import Path

import pytest

from masters.common import machine
from masters.common.errors import StoreError
from masters.store import locks
from masters.store.locks import Lease, exclusive_build, hold_lease
from masters.store.storage import Storage
from tests.local_stack import until
from tests.s3_server import BUCKET, S3

FOLDER = "train/demo-0123"


@pytest.fixture(autouse=True)
def _short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT_INTERVAL", 0.1)
    monkeypatch.setattr(locks, "HEARTBEAT_TIMEOUT", 1.0)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


@pytest.fixture
def invisible_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every process as one of another machine, which this one cannot see."""
    monkeypatch.setattr(machine, "has_ended", lambda _: None)


def test_lease_holders_run_one_after_the_other(storage: Storage, invisible_processes: None) -> None:
    inside, most_inside = 0, 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal inside, most_inside
        with hold_lease(storage, FOLDER, lambda: None):
            with lock:
                inside += 1
                most_inside = max(most_inside, inside)
            time.sleep(0.15)
            with lock:
                inside -= 1

    workers = [threading.Thread(target=work) for _ in range(5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert (inside, most_inside) == (0, 1)


def test_a_run_waits_while_the_holder_sends_heartbeats(storage: Storage, invisible_processes: None) -> None:
    waiting = threading.Event()

    def second() -> None:
        with hold_lease(storage, FOLDER, waiting.set):
            pass

    with hold_lease(storage, FOLDER, lambda: None) as first:
        other = threading.Thread(target=second)
        other.start()
        time.sleep(2.5)  # longer than the timeout
        assert waiting.is_set() and other.is_alive()
        first.check_held()
    other.join(300)
    assert not other.is_alive()


def test_a_holder_without_heartbeats_is_replaced_and_must_not_commit(
    storage: Storage, invisible_processes: None
) -> None:
    stopped = Lease(storage, FOLDER)
    stopped.acquire(lambda: None)  # without sending heartbeats
    began = time.monotonic()
    with hold_lease(storage, FOLDER, lambda: None) as second:
        assert time.monotonic() - began > 0.9
        with pytest.raises(StoreError, match="another run took over"):
            stopped.check_held()
        stopped.release()  # does not affect the present holder
        second.check_held()
    with pytest.raises(StoreError):
        stopped.check_held()


def test_a_run_does_not_wait_for_an_ended_process_of_this_machine(storage: Storage) -> None:
    host, boot, pid, *_ = machine.this_process().split()
    dead = json.dumps(dict(process=f"{host} {boot} {pid} 1", holder="x", beats=3)).encode()
    storage.create(f"leases/{FOLDER}/00000004", dead)
    with hold_lease(storage, FOLDER, pytest.fail):  # called before it waits
        pass


def test_repeated_leases_leave_one_object(storage: Storage) -> None:
    for _ in range(3):
        with hold_lease(storage, FOLDER, pytest.fail):
            pass
    assert storage.names("leases") == [f"leases/{FOLDER}/00000003"]


def test_a_lease_excludes_other_machines_on_s3(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread has its own work folder, so that they share no lock file."""
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine, "has_ended", lambda _: None)
    root, messages, order = f"s3://{BUCKET}/leased", [], []

    def build(name: str) -> None:
        (tmp_path / name).mkdir()
        with exclusive_build(Storage(root), FOLDER, tmp_path / name, messages.append) as check:
            order.append(name)
            time.sleep(1.0)
            check()
            order.append(name)

    both = [threading.Thread(target=build, args=(name,)) for name in ("one", "two")]
    for thread in both:
        thread.start()
    until(lambda: messages, "the second waits")
    for thread in both:
        thread.join(300)
    assert order in (["one", "one", "two", "two"], ["two", "two", "one", "one"])
    assert messages == ["another machine"]


def test_a_process_of_another_container_cannot_be_judged() -> None:
    """Containers may share a host name, and each has a process 1."""
    *process, namespace = machine.this_process().split(" ")
    assert namespace.startswith("pid:[")
    assert machine.has_ended(machine.this_process()) is False
    assert machine.has_ended(" ".join([*process, "pid:[1]"])) is None
    assert machine.has_ended(" ".join(process)) is False  # the form of earlier versions
    host, _, pid, started = process
    assert machine.has_ended(f"{host} another-boot {pid} {started} pid:[1]") is True
