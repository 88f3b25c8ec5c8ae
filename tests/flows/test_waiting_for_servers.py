"""Patience: in a deployment a store or server that is away is waited for; a person at a terminal is told at once."""

import time
from types import SimpleNamespace

import pytest

from masters.common.errors import InputError, Unreachable
from masters.flows import retries


class Away:
    """Answers after it was asked `times` in vain."""

    def __init__(self, times: int, error: Exception) -> None:
        self.times, self.error, self.asked = times, error, 0

    def __call__(self) -> str:
        self.asked += 1
        if self.asked <= self.times:
            raise self.error
        return "there"


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "deployment", SimpleNamespace(id="a deployment's"))
    monkeypatch.setattr(time, "sleep", lambda _: None)


def test_a_deployment_waits_for_its_store(deployed: None) -> None:
    store = Away(3, Unreachable("away"))
    assert retries.retry_unreachable(store) == "there" and store.asked == 4


def test_waiting_for_a_store_ends(deployed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "RETRY_SECONDS", 0.0)
    with pytest.raises(Unreachable, match="away"):
        retries.retry_unreachable(Away(10, Unreachable("away")))


def test_bad_input_is_not_waited_for(deployed: None) -> None:
    store = Away(1, InputError("wrong"))
    with pytest.raises(InputError, match="wrong"):
        retries.retry_unreachable(store)
    assert store.asked == 1


def test_a_person_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "deployment", SimpleNamespace(id=None))
    store = Away(1, Unreachable("away"))
    with pytest.raises(Unreachable):
        retries.retry_unreachable(store)
    assert store.asked == 1
