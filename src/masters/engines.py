"""Has engines do pieces of work: one child process a model, one after the other, or several actors at a time on Ray.

A piece is what an engine does at once and commits to the store itself, a shard or a batch to judge; what it made does
not depend on which engine did it, so neither does anything here. Ray lives in a child of its own
(`masters.models.ray_worker`): the flow stays light, and silence, a lost driver and a cancellation end it as any child.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from masters import processes
from masters.config import Runtime


@dataclass(frozen=True)
class Work:
    """Pieces for engines of one model.

    `module`: has `opened(setup)`, a context manager whose `do(piece)` does one and returns its line of progress, and
    `main`, which runs them all as a child process. `cost`: of all pieces, to compare models by.
    """

    name: str
    module: str
    setup: dict
    pieces: list[dict]
    cost: float
    folder: str  # of the model
    digest: str


def run(
    work: list[Work],
    at_most: int,
    runtime: Runtime,
    folder: Path,
    on_progress: Callable[[str, dict], None],
    beside: Sequence[processes.Child] = (),
) -> dict:
    """Do all pieces with at most `at_most` engines at a time. Returns how it ran, for the summary.

    `engines` started in all, `workers` at a time, `restarts` after an engine died. Raises as `processes.run` does.
    """
    work = [part for part in work if part.pieces]
    workers = min(at_most, sum(len(part.pieces) for part in work))
    if workers and (workers > 1 or runtime.ray_address):
        return _on_ray(work, workers, runtime, folder, on_progress, beside)
    children = [
        processes.Child(part.name, part.module, part.setup | dict(pieces=part.pieces), folder, {}) for part in work
    ]
    beside = beside if children else ()
    ran = processes.run(children, 1, on_progress, runtime.silence_minutes * 60, beside)
    return dict(engines=len(children), workers=workers, restarts=0, **ran.told())


def _on_ray(
    work: list[Work],
    workers: int,
    runtime: Runtime,
    folder: Path,
    on_progress: Callable[[str, dict], None],
    beside: Sequence[processes.Child],
) -> dict:
    job = dict(work=[asdict(part) for part in work], workers=workers, runtime=runtime.model_dump())
    how: dict = {}

    def hear(name: str, line: dict) -> None:
        if line["event"] == "ran":
            how.update(line["how"])
        else:
            on_progress(name, line)

    driver = processes.Child("ray", "masters.models.ray_worker", job, folder, {})
    ran = processes.run([driver], 1, hear, runtime.silence_minutes * 60, beside)
    peak = round(ran.peak_mib + how.pop("peak_mib"))
    return how | dict(children_peak_mib=peak, ray_seconds=ran.startup_seconds[0])
