"""Has engines do pieces of work, in child processes or as actors on Ray: where generation, evaluation and judging meet.

A piece is what an engine does at once and commits to the store itself, a shard or a batch to judge; what it made does
not depend on which engine did it, so neither does anything here. Without `runtime.ray_address` each model has its child
process. With it, several engines may serve a model: Ray lives in a child of its own
(`masters.execution.ray_engines.driver`), so the flow stays light, and silence, a lost driver and a
cancellation end it as they end any child.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from masters.config import Runtime
from masters.execution import processes

ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # engines side by side beat one that spreads tiny matrices over the cores


@dataclass(frozen=True)
class Work:
    """Pieces for engines of one model.

    `module`: has `opened(setup)`, a context manager whose `do(piece)` does one and returns its line of progress, and
    `main`, which does them all as a child process. `cost`: of all pieces, to compare models by. Without Ray, `children`
    processes share the pieces, in an environment with these additions; an actor's threads are Ray's to bound.
    """

    name: str
    module: str
    setup: dict
    pieces: list[dict]
    cost: float
    folder: str  # of the model
    digest: str
    children: int = 1
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stay:
    """An engine that is kept for a model's next weights.

    `digest`: of the model that it serves in this run, in the weights that it has or is to take. `again`: whether it
    will be asked once more. On Ray engines end with their run, and start anew.
    """

    standing: processes.Standing
    digest: str
    again: bool


def run(
    work: list[Work],
    runtime: Runtime,
    folder: Path,
    on_progress: Callable[[str, dict], None],
    beside: Sequence[processes.Child] = (),
    stay: Stay | None = None,
) -> dict:
    """Do all pieces with at most `runtime.generate_workers` engines at a time. Returns how it ran, for the summary.

    `engines` started in all, `workers` at a time; on Ray also `restarts` after an engine died; `kept` engines that were
    there already. `beside` runs with the engines, if there are any. `stay`: an engine that outlives the run. Raises as
    `processes.run` does.
    """
    work = [part for part in work if part.pieces]
    if work and runtime.ray_address:
        return _on_ray(work, runtime, folder, on_progress, beside)
    kept = sum(bool(stay and stay.standing.alive and part.digest == stay.digest) for part in work)
    children = [child for part in work for child in _children(part, folder, stay)]
    at_once, silence = runtime.generate_workers, runtime.heartbeat_timeout_minutes * 60
    ran = processes.run(children, at_once, on_progress, silence, beside if children else ())
    how = dict(engines=len(children) - kept, workers=min(at_once, len(children)), **ran.told())
    return how | (dict(kept=kept) if kept else {})


def _children(work: Work, folder: Path, stay: Stay | None) -> list[processes.Child]:
    def child(name: str, pieces: list[dict]) -> processes.Child:
        return processes.Child(name, work.module, work.setup | dict(pieces=pieces), folder, work.environment)

    if stay and stay.digest == work.digest and (stay.again or stay.standing.alive):
        one = child(work.name, work.pieces)
        return [replace(one, job=one.job | dict(stays=stay.again), standing=stay.standing, stays=stay.again)]
    if work.children == 1:
        return [child(work.name, work.pieces)]
    return [child(f"{work.name}-{n}", work.pieces[n :: work.children]) for n in range(work.children)]


def _on_ray(
    work: list[Work],
    runtime: Runtime,
    folder: Path,
    on_progress: Callable[[str, dict], None],
    beside: Sequence[processes.Child],
) -> dict:
    workers = min(runtime.generate_workers, sum(len(part.pieces) for part in work))
    job = dict(work=[asdict(part) for part in work], workers=workers, runtime=runtime.model_dump())
    how: dict = {}

    def hear(name: str, line: dict) -> None:
        if line["event"] == "ran":
            how.update(line["how"])
        else:
            on_progress(name, line)

    driver = processes.Child("ray", "masters.execution.ray_engines.driver", job, folder, {})
    ran = processes.run([driver], 1, hear, runtime.heartbeat_timeout_minutes * 60, beside)
    peak = round(ran.peak_mib + how.pop("peak_mib"))
    return how | dict(children_peak_mib=peak, ray_seconds=ran.startup_seconds[0])
