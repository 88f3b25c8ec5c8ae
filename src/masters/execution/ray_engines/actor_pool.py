"""The driver of engines on Ray: starts actors, gives them pieces until none is left, and replaces those that die.

`python -m masters.execution.ray_engines.actor_pool JOB.json`, with a `masters.execution.engines.RayJob`. Engines write
results into the store themselves; only pieces and events pass through the driver.
"""

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from masters.common.errors import MastersError, WorkerError
from masters.execution import child_process
from masters.execution.engines import EnginePiece, EngineWork, OnEvent, RayJob
from masters.execution.events import EngineRestarted, EngineStarted, RayFinished, RayStarted
from masters.execution.ray_engines.actor import EngineActor, NodeRequirements, node_requirements
from masters.execution.ray_engines.scheduler import WorkScheduler
from masters.execution.ray_engines.session import find_capacity, local_ray, ray_cluster


@dataclass
class ActorSlot:
    """A running actor, the index of the model that it serves, and its piece (None while it starts)."""

    actor: Any
    model: int
    start_time: float
    piece: EnginePiece | None = None
    peak_mib: float = 0.0


class ActorPool:
    """Runs actors until all pieces are done; at most `max_restarts` dead ones are replaced."""

    def __init__(
        self,
        work: Sequence[EngineWork],
        workers: int,
        gpus: int,
        max_restarts: int,
        requirements: NodeRequirements | None,
        on_event: OnEvent,
    ) -> None:
        self._work, self._workers, self._gpus, self._max_restarts = work, workers, gpus, max_restarts
        self._requirements, self._on_event = requirements, on_event
        self._scheduler = WorkScheduler([part.pieces for part in work], [part.cost for part in work])
        self._busy: dict[Any, ActorSlot] = {}  # by the reference to the result of the call that is under way
        self._startup_seconds: list[float] = []
        self._peaks_mib: list[float] = []
        self._engines = self._most_at_a_time = self._restarts = 0

    def run(self) -> RayFinished:
        """Do all pieces. Raises what an engine raised, WorkerError if too many died."""
        import ray

        while len(self._busy) < self._workers and (model := self._scheduler.choose_initial_model()) is not None:
            self._start(model)
        while self._busy:
            for result in ray.wait(list(self._busy))[0]:
                self._receive(self._busy.pop(result), result)
        return RayFinished(
            engines=self._engines,
            workers=self._most_at_a_time,
            restarts=self._restarts,
            startup_seconds=self._startup_seconds,
            peak_mib=sum(sorted(self._peaks_mib)[-self._workers :]),
        )

    def _start(self, model: int) -> None:
        import ray

        # no restarts by Ray: it would start an actor again without its engine
        actor = ray.remote(EngineActor).options(num_cpus=1, num_gpus=self._gpus, max_restarts=0).remote()
        work = self._work[model].model_copy(update=dict(pieces=()))
        self._busy[actor.start.remote(work, self._requirements)] = ActorSlot(actor, model, time.monotonic())
        self._scheduler.add_engine(model)
        self._engines += 1
        self._most_at_a_time = max(self._most_at_a_time, len(self._busy))

    def _receive(self, slot: ActorSlot, result: Any) -> None:
        """Take the result of an actor's last call, or notice that the actor died."""
        import ray
        from ray import exceptions

        try:
            value = ray.get(result)
        except (exceptions.RayActorError, exceptions.ObjectLostError, exceptions.OutOfMemoryError) as error:
            self._replace(slot, error)
        except exceptions.RayTaskError as error:
            raise _unwrap(error) from error
        else:
            self._report(slot, value)
            self._give_piece(slot)

    def _report(self, slot: ActorSlot, value: Any) -> None:
        """Report a start (`value`: the process id) or a finished piece (its event and the actor's peak memory)."""
        if slot.piece is None:
            self._startup_seconds.append(round(time.monotonic() - slot.start_time, 2))
            self._on_event(EngineStarted(pid=value, model=self._work[slot.model].name))
        else:
            event, slot.peak_mib = value
            self._on_event(event)

    def _give_piece(self, slot: ActorSlot) -> None:
        """Give an actor its model's next piece; without one, exchange it for another model's, if that is worth it."""
        slot.piece = self._scheduler.take_piece(slot.model)
        if slot.piece is not None:
            self._busy[slot.actor.do.remote(slot.piece)] = slot
            return
        self._end(slot)
        if (model := self._scheduler.choose_next_model()) is not None:
            self._start(model)

    def _replace(self, slot: ActorSlot, error: Exception) -> None:
        """Replace a dead actor; the first free actor of its model does its piece next. Raises WorkerError."""
        self._end(slot)
        if slot.piece is not None:
            self._scheduler.return_piece(slot.model, slot.piece)
        name = self._work[slot.model].name
        place = f"at {slot.piece.out}" if slot.piece else "while it started"
        print(f"an engine of {name} died {place}: {error}", flush=True)
        if self._restarts == self._max_restarts:
            raise WorkerError(
                f"engines died {self._restarts + 1} times (runtime.engine_restarts bounds how often), "
                f"the last of {name} {place}: {' '.join(str(error).split())}"
            )
        if (model := self._scheduler.choose_replacement_model(slot.model)) is not None:
            self._restarts += 1
            self._on_event(EngineRestarted())
            self._start(model)

    def _end(self, slot: ActorSlot) -> None:
        import ray

        self._scheduler.remove_engine(slot.model)
        self._peaks_mib.append(slot.peak_mib)
        ray.kill(slot.actor)


def _unwrap(error: Any) -> Exception:
    """Return the error that an engine raised, in one line and without Ray's report around it."""
    if isinstance(error.cause, MastersError):
        return error.cause
    print(error, flush=True)
    return WorkerError(f"an engine failed: {type(error.cause).__name__}: {' '.join(str(error.cause).split())[:400]}")


def main(job_file: Path) -> None:
    job = RayJob.model_validate_json(job_file.read_text())
    runtime, report = job.runtime, partial(child_process.report_event, job_file)
    with ray_cluster(runtime.cluster) if runtime.cluster else local_ray(job.workers):
        report(RayStarted(pid=os.getpid()))
        gpus, engines = find_capacity(runtime.engine_gpus, runtime.tensor_parallel_size)
        if engines < job.workers:
            print(f"{job.workers} engines were requested, Ray has room for {engines} at a time", flush=True)
        workers = min(engines, job.workers)
        with node_requirements(job.work[0].setup.store) if runtime.cluster else nullcontext() as requirements:
            pool = ActorPool(job.work, workers, gpus, runtime.engine_restarts * workers, requirements, report)
            report(pool.run())


if __name__ == "__main__":
    child_process.child_main(main)
