"""The driver replaces an engine on Ray that dies; on a real Ray: tests/flows/test_ray_and_fsdp_run.py."""

import pytest
from ray import exceptions

from masters.execution.ray_engines.actor_pool import ActorPool


@pytest.mark.parametrize("error", [exceptions.RayActorError(), exceptions.OutOfMemoryError("the node is full")])
def test_an_engine_that_dies_or_that_ray_ends_for_memory_is_replaced(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(_: object) -> None:
        raise error

    pool, replaced = object.__new__(ActorPool), []
    monkeypatch.setattr("ray.get", get)
    monkeypatch.setattr(ActorPool, "_replace", lambda _, slot, cause: replaced.append((slot, cause)))
    pool._receive("slot", None)  # pyright: ignore[reportArgumentType]
    assert replaced == [("slot", error)]
