"""What becomes of an engine on Ray that dies; on a real Ray, in mid-run: tests/flows/test_ray_and_fsdp_run.py."""

import pytest
from ray import exceptions

from masters.execution.ray_engines.driver import ActorPool


@pytest.mark.parametrize("error", [exceptions.RayActorError(), exceptions.OutOfMemoryError("the node is full")])
def test_an_engine_that_dies_or_that_ray_ends_for_memory_is_replaced(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(_: object) -> None:
        raise error

    pool, lost = object.__new__(ActorPool), []
    monkeypatch.setattr("ray.get", get)
    monkeypatch.setattr(ActorPool, "_lost", lambda _, seat, why: lost.append((seat, why)))
    pool._hear("seat", None)  # pyright: ignore[reportArgumentType]
    assert lost == [("seat", error)]
