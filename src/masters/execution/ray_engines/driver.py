"""The driver of engines on Ray: starts actors, feeds them until nothing is left, replaces those that die.

`python -m masters.execution.ray_engines.driver JOB.json`; the job is made by `masters.execution.engines`. What engines
make goes from them into the store; here only what is asked and lines of progress pass through.
"""

import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masters.common.errors import MastersError, WorkerError
from masters.config import Runtime
from masters.execution import processes
from masters.execution.ray_engines.actor import EngineActor, NodeRequirements, alike
from masters.execution.ray_engines.scheduler import WorkScheduler
from masters.execution.ray_engines.session import cluster, local, room


@dataclass
class ActorSlot:
    """An actor, the model that it serves, the piece that it is at (None: it starts)."""

    actor: Any
    model: int
    began: float
    piece: dict | None = None
    peak: float = 0.0  # MiB


class ActorPool:
    """Actors at work on a job. `report` hears their lines of progress."""

    def __init__(
        self, job: dict, gpus: int, workers: int, alike: NodeRequirements | None, report: Callable[..., None]
    ) -> None:
        self._alike, self._work, self._report, self._workers = alike, job["work"], report, workers
        runtime = Runtime(**job["runtime"])
        self._deal = WorkScheduler([of["pieces"] for of in self._work], [of["cost"] for of in self._work])
        self._restarts_left, self._restarts = runtime.engine_restarts * workers, 0
        self._gpus, self._busy, self._peaks = gpus, {}, []
        self._startup: list[float] = []
        self._engines, self._most = 0, 0

    def run(self) -> dict:
        """Do everything; returns how, for the summary. Raises what an engine raised, WorkerError if too many died."""
        import ray

        while len(self._busy) < self._workers and (model := self._deal.first()) is not None:
            self._start(model)
        while self._busy:
            for ref in ray.wait(list(self._busy))[0]:
                self._hear(self._busy.pop(ref), ref)
        peak = sum(sorted(self._peaks)[-self._workers :])
        return dict(
            engines=self._engines, workers=self._most, restarts=self._restarts, startup_seconds=self._startup,
            peak_mib=peak,
        )  # fmt: skip

    def _start(self, model: int) -> None:
        import ray

        # no retries of Ray's own: it would start an actor anew without its engine
        actor = ray.remote(EngineActor).options(num_cpus=1, num_gpus=self._gpus, max_restarts=0).remote()
        what = {name: self._work[model][name] for name in ("module", "setup", "folder", "digest")}
        self._busy[actor.start.remote(what, self._alike)] = ActorSlot(actor, model, time.monotonic())
        self._deal.join(model)
        self._engines, self._most = self._engines + 1, max(self._most, len(self._busy))

    def _hear(self, seat: ActorSlot, ref: Any) -> None:
        """What an actor answered to the last call, or that it died."""
        import ray
        from ray import exceptions

        try:
            said = ray.get(ref)
        except (exceptions.RayActorError, exceptions.ObjectLostError, exceptions.OutOfMemoryError) as error:
            self._lost(seat, error)
        except exceptions.RayTaskError as error:
            raise _own(error) from error
        else:
            self._done(seat, said)
            self._feed(seat)

    def _done(self, seat: ActorSlot, said: Any) -> None:
        if seat.piece is None:
            self._startup.append(round(time.monotonic() - seat.began, 2))
            self._report(event="engine", pid=said, model=self._work[seat.model]["name"])
        else:
            line, seat.peak = said
            self._report(**line)

    def _feed(self, seat: ActorSlot) -> None:
        """The next piece of its model; without one another model's engine takes its place, where that is worth it."""
        seat.piece = self._deal.take(seat.model)
        if seat.piece is not None:
            self._busy[seat.actor.do.remote(seat.piece)] = seat
            return
        self._leave(seat)
        if (model := self._deal.next()) is not None:
            self._start(model)

    def _lost(self, seat: ActorSlot, error: Exception) -> None:
        """Replace a dead actor; what it was at is next for whoever of its model is free first."""
        self._leave(seat)
        if seat.piece is not None:
            self._deal.give_back(seat.model, seat.piece)
        name = self._work[seat.model]["name"]
        doing = f"at {seat.piece.get('out', 'a piece')}" if seat.piece else "while it started"
        print(f"an engine of {name} died {doing}: {error}", flush=True)
        if not self._restarts_left:
            raise WorkerError(
                f"engines died {self._restarts + 1} times (runtime.engine_restarts bounds how often), "
                f"the last of {name} {doing}: {' '.join(str(error).split())}"
            )
        if (model := self._deal.instead_of(seat.model)) is not None:
            self._restarts, self._restarts_left = self._restarts + 1, self._restarts_left - 1
            self._report(event="restart")
            self._start(model)

    def _leave(self, seat: ActorSlot) -> None:
        import ray

        self._deal.leave(seat.model)
        self._peaks.append(seat.peak)
        ray.kill(seat.actor)


def _own(error: Any) -> Exception:
    """What an engine raised, without Ray's report around it: one line where it is an error for people."""
    if isinstance(error.cause, MastersError):
        return error.cause
    print(error, flush=True)
    return WorkerError(f"an engine failed: {type(error.cause).__name__}: {' '.join(str(error.cause).split())[:400]}")


def main(job_file: Path) -> None:
    job = json.loads(job_file.read_text())
    runtime = Runtime(**job["runtime"])
    with cluster(runtime.cluster) if runtime.cluster else local(job["workers"]):
        processes.report(job_file, event="ray", pid=os.getpid())
        gpus, places = room(runtime.engine_gpus, runtime.tensor_parallel_size)
        if places < job["workers"]:
            print(f"{job['workers']} engines were asked for, {places} have room at a time", flush=True)
        workers = min(places, job["workers"])
        with alike(job["work"][0]["setup"]["store"]) if runtime.cluster else nullcontext() as expected:
            pool = ActorPool(job, gpus, workers, expected, lambda **line: processes.report(job_file, **line))
            processes.report(job_file, event="ran", how=pool.run())


if __name__ == "__main__":
    processes.child_main(main)
