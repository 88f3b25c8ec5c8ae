"""Have engines do pieces of work, in child processes or as actors on Ray. Generation, evaluation and judging use it.

A piece, such as a shard or a batch to judge, is what an engine does at once and commits to the store itself. Its
result does not depend on the engine that did it. Without `runtime.ray_address` each model has its child process. With
it, several engines may serve a model. Ray itself lives in a child process, `masters.execution.ray_engines.actor_pool`:
the flow stays light, and a missed heartbeat, a lost driver and a cancellation end it as they end any child.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, SerializeAsAny

from masters.config import Runtime
from masters.execution import processes
from masters.execution.events import EngineEvent, RayFinished, parse_event
from masters.execution.processes import Child, PersistentProcess, WorkerModule

# engines side by side are faster than one that spreads tiny matrices over the cores
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

OnEvent = Callable[[EngineEvent], None]


class EngineSetup(BaseModel):
    """Everything that an engine needs to start. Each worker module has its own subclass."""

    # the driver passes on the fields of any subclass
    model_config = ConfigDict(extra="allow", frozen=True)

    store: str
    runtime: Runtime


class EnginePiece(BaseModel):
    """One piece of work. Each worker module has its own subclass."""

    model_config = ConfigDict(extra="allow", frozen=True)

    out: str  # the file in the store that the engine writes


class EngineJob(BaseModel):
    """Job of an engine's child process. `is_reused`: another job will follow for the same engine."""

    model_config = ConfigDict(frozen=True)

    setup: SerializeAsAny[EngineSetup]
    pieces: tuple[SerializeAsAny[EnginePiece], ...]
    is_reused: bool = False


class EngineWork(BaseModel):
    """Pieces for engines of one model.

    `module` has `main`, which runs an EngineJob in a child process, and a class `Worker` for actors on Ray: with the
    attributes `Setup` and `Piece` (subclasses of those above), a constructor that takes the setup, and `do(piece)`,
    which returns an event. `cost`: of all pieces together, in a unit that models share. `folder` and `digest` are the
    model's. Without Ray, `children` processes share the pieces, with `environment` added; Ray bounds an actor's
    threads itself.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    module: str
    setup: SerializeAsAny[EngineSetup]
    pieces: tuple[SerializeAsAny[EnginePiece], ...]
    cost: float
    folder: Path
    digest: str
    children: int = 1
    environment: dict[str, str] = {}


class RayJob(BaseModel):
    """Job of the Ray driver's process."""

    model_config = ConfigDict(frozen=True)

    work: tuple[EngineWork, ...]
    workers: int
    runtime: Runtime


@dataclass(frozen=True)
class KeptEngine:
    """An engine that is kept for the next weights of its model.

    `digest`: of the model that it serves in this run, with the weights that it has or is to load. `is_reused`: another
    run will use the engine. On Ray, engines end with their run and start again.
    """

    process: PersistentProcess
    digest: str
    is_reused: bool


def run(
    work: list[EngineWork],
    runtime: Runtime,
    folder: Path,
    on_event: OnEvent,
    kept_engine: KeptEngine | None = None,
) -> dict:
    """Do all pieces with at most `runtime.generate_workers` engines at a time. Returns statistics for the summary.

    They are `engines` started in all and `workers` at a time; on Ray also `restarts` after an engine died; `kept`
    engines that were running already. `kept_engine` outlives the run. Raises what `processes.run` raises.
    """
    work = [part for part in work if part.pieces]
    if work and runtime.ray_address:
        return _run_on_ray(work, runtime, folder, on_event)
    running = sum(bool(kept_engine and kept_engine.process.is_alive and kept_engine.digest == w.digest) for w in work)
    children = [child for part in work for child in _make_children(part, folder, kept_engine)]
    usage = processes.run(
        children,
        runtime.generate_workers,
        lambda _, line: on_event(parse_event(line)),
        runtime.heartbeat_timeout_minutes * 60,
    )
    workers = min(runtime.generate_workers, len(children))
    statistics = dict(engines=len(children) - running, workers=workers, **usage.summarize())
    return statistics | (dict(kept=running) if running else {})


def _make_children(work: EngineWork, folder: Path, kept_engine: KeptEngine | None) -> list[Child]:
    """Return the child processes that share the pieces of one model."""
    if kept_engine and kept_engine.digest == work.digest and (kept_engine.is_reused or kept_engine.process.is_alive):
        job = EngineJob(setup=work.setup, pieces=work.pieces, is_reused=kept_engine.is_reused)
        persistent, keep_alive = kept_engine.process, kept_engine.is_reused
        return [Child(work.name, work.module, job, folder, work.environment, persistent, keep_alive)]
    shares = [work.pieces[number :: work.children] for number in range(work.children)]
    return [
        Child(
            work.name if work.children == 1 else f"{work.name}-{number}",
            work.module,
            EngineJob(setup=work.setup, pieces=share),
            folder,
            work.environment,
        )
        for number, share in enumerate(shares)
    ]


def _run_on_ray(work: list[EngineWork], runtime: Runtime, folder: Path, on_event: OnEvent) -> dict:
    workers = min(runtime.generate_workers, sum(len(part.pieces) for part in work))
    finished: list[RayFinished] = []

    def pass_on(_: str, line: dict) -> None:
        match parse_event(line):
            case RayFinished() as event:
                finished.append(event)
            case event:
                on_event(event)

    driver = Child("ray", WorkerModule.RAY_DRIVER, RayJob(work=tuple(work), workers=workers, runtime=runtime), folder)
    usage = processes.run([driver], 1, pass_on, runtime.heartbeat_timeout_minutes * 60)
    (event,) = finished
    return event.model_dump(exclude={"event", "peak_mib"}) | dict(
        children_peak_mib=round(usage.peak_mib + event.peak_mib), ray_seconds=usage.startup_seconds[0]
    )
