"""A deployment retries while a store or server is unreachable; a person at a terminal gets the error at once."""

import time
from types import SimpleNamespace

import pytest

from masters.common.errors import InputError, TrackingError, Unreachable
from masters.flows import retries


class UnreachableServer:
    """Raises an error at the first `failures` calls."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.failures, self.error, self.calls = failures, error, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return "result"


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "deployment", SimpleNamespace(id="a deployment's"))
    monkeypatch.setattr(time, "sleep", lambda _: None)


@pytest.mark.parametrize("error", [Unreachable("away"), TrackingError("MLflow broke off while a run was opened")])
def test_a_deployment_retries_a_server_that_does_not_answer(error: Exception, deployed: None) -> None:
    store = UnreachableServer(3, error)
    assert retries.retry_unreachable(store) == "result" and store.calls == 4


def test_retries_end_after_a_time_limit(deployed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "RETRY_SECONDS", 0.0)
    with pytest.raises(Unreachable, match="away"):
        retries.retry_unreachable(UnreachableServer(10, Unreachable("away")))


def test_bad_input_is_not_retried(deployed: None) -> None:
    store = UnreachableServer(1, InputError("wrong"))
    with pytest.raises(InputError, match="wrong"):
        retries.retry_unreachable(store)
    assert store.calls == 1


def test_outside_a_deployment_nothing_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "deployment", SimpleNamespace(id=None))
    store = UnreachableServer(1, Unreachable("away"))
    with pytest.raises(Unreachable):
        retries.retry_unreachable(store)
    assert store.calls == 1
