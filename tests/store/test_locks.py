"""One run at a time builds what lies in a store that several machines share; here threads are the machines."""

import json
import threading
import time
from pathlib import Path

import pytest

from masters.common import machine
from masters.common.errors import StoreError
from masters.store import locks
from masters.store.locks import Lease, exclusive_build, leased
from masters.store.storage import Storage
from tests.local_stack import until
from tests.s3_server import BUCKET, S3

FOLDER = "train/demo-0123"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.1)
    monkeypatch.setattr(locks, "PATIENCE", 1.0)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process counts as another machine's: nobody can see whether it runs."""
    monkeypatch.setattr(machine, "ended", lambda _: None)


def test_lease_holders_run_one_after_the_other(storage: Storage, elsewhere: None) -> None:
    inside, most = 0, 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        with leased(storage, FOLDER, lambda: None):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.15)
            with lock:
                inside -= 1

    workers = [threading.Thread(target=work) for _ in range(5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert (inside, most) == (0, 1)


def test_a_holder_that_gives_signs_of_life_is_waited_for(storage: Storage, elsewhere: None) -> None:
    waited = threading.Event()

    def second() -> None:
        with leased(storage, FOLDER, waited.set):
            pass

    with leased(storage, FOLDER, lambda: None) as first:
        other = threading.Thread(target=second)
        other.start()
        time.sleep(2.5)  # more than patience
        assert waited.is_set() and other.is_alive()
        first.check()
    other.join(300)
    assert not other.is_alive()


def test_a_silent_holder_is_taken_over_and_may_not_commit(storage: Storage, elsewhere: None) -> None:
    silent = Lease(storage, FOLDER)
    silent.take(lambda: None)  # and never heard of again
    began = time.monotonic()
    with leased(storage, FOLDER, lambda: None) as second:
        assert time.monotonic() - began > 0.9
        with pytest.raises(StoreError, match="another run took over"):
            silent.check()
        silent.release()  # takes nothing from who holds it now
        second.check()
    with pytest.raises(StoreError):
        silent.check()


def test_a_holder_of_this_machine_that_ended_is_not_waited_for(storage: Storage) -> None:
    host, boot, pid, *_ = machine.this_process().split()
    dead = json.dumps(dict(process=f"{host} {boot} {pid} 1", holder="x", beats=3)).encode()
    storage.create(f"leases/{FOLDER}/00000004", dead)
    with leased(storage, FOLDER, pytest.fail):  # which it would call before it waits
        pass


def test_leases_taken_again_leave_one_object(storage: Storage) -> None:
    for _ in range(3):
        with leased(storage, FOLDER, pytest.fail):
            pass
    assert storage.names("leases") == [f"leases/{FOLDER}/00000003"]


def test_a_lease_excludes_other_machines_on_s3(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with work folders of its own, so that no lock file is shared."""
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine, "ended", lambda _: None)
    root, said, order = f"s3://{BUCKET}/leased", [], []

    def machine_(name: str) -> None:
        (tmp_path / name).mkdir()
        with exclusive_build(Storage(root), FOLDER, tmp_path / name, said.append) as check:
            order.append(name)
            time.sleep(1.0)
            check()
            order.append(name)

    both = [threading.Thread(target=machine_, args=(name,)) for name in ("one", "two")]
    for each in both:
        each.start()
    until(lambda: said, "the second waits")
    for each in both:
        each.join(300)
    assert order in (["one", "one", "two", "two"], ["two", "two", "one", "one"])
    assert said == ["another machine"]


def test_a_process_of_another_container_is_none_of_ours() -> None:
    """Containers of one host may share its name; each has a process 1."""
    *process, namespace = machine.this_process().split(" ")
    assert namespace.startswith("pid:[")
    assert machine.ended(machine.this_process()) is False
    assert machine.ended(" ".join([*process, "pid:[1]"])) is None
    assert machine.ended(" ".join(process)) is False  # as earlier versions named it
    host, _, pid, started = process
    assert machine.ended(f"{host} another-boot {pid} {started} pid:[1]") is True
