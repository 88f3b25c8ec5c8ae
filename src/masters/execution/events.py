"""Types of the lines of progress that engine processes write."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from masters.rewards.verdict import Status


class Event(BaseModel):
    """One line of progress. Each kind has its own value of `event`."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineStarted(Event):
    """An engine is ready. On Ray with its process id and its model's name."""

    event: Literal["engine"] = "engine"
    pid: int | None = None
    model: str | None = None


class ShardAnswered(Event):
    """A shard's responses or predictions are in the store."""

    event: Literal["shard"] = "shard"
    questions: int


class BatchJudged(Event):
    """A judge has worked on a batch of triples; its final verdicts are in the store.

    `without_verdict`: the other triples, by digest, each with its status and the reason.
    """

    event: Literal["batch"] = "batch"
    triples: int
    without_verdict: list[tuple[str, Status, str]]


class RayStarted(Event):
    """The driver process is connected to Ray."""

    event: Literal["ray"] = "ray"
    pid: int


class EngineRestarted(Event):
    """An engine on Ray died and another one replaces it."""

    event: Literal["restart"] = "restart"


class RayFinished(Event):
    """All pieces are done on Ray: engines started, most at a time, restarts, start times, and MiB at the peak."""

    event: Literal["ran"] = "ran"
    engines: int
    workers: int
    restarts: int
    startup_seconds: list[float]
    peak_mib: float


EngineEvent = Annotated[
    EngineStarted | ShardAnswered | BatchJudged | RayStarted | EngineRestarted | RayFinished,
    Field(discriminator="event"),
]
_ADAPTER: TypeAdapter[EngineEvent] = TypeAdapter(EngineEvent)


def parse_event(line: dict) -> EngineEvent:
    """Return a line of progress as its type."""
    return _ADAPTER.validate_python(line)
