"""Has models answer shards: plans what is missing, runs one engine process a model, gathers the shards' files.

Generation and evaluation share it. A shard lies at `shards/<kind>/<fingerprint>.parquet` in the store, named by
what it was made from, so later runs and other artifacts reuse it; an artifact holds its own (hard-linked) copy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from masters import artifacts, processes
from masters.config import Runtime
from masters.identity import digest, fingerprint
from masters.shards import Shard
from masters.storage import Storage

VERSION = 1  # of what engines are asked and how rows are made; a new one makes new shards


@dataclass(frozen=True)
class Answerer:
    """A model that answers: its name in tables, folder, content digest and, masked, thresholds by ratio."""

    name: str
    folder: Path
    digest: str
    thresholds: dict[float, dict[str, float]]
    thresholds_fingerprint: str | None = None


@dataclass(frozen=True)
class Order:
    """A shard to be answered by someone in some way."""

    answerer: Answerer
    shard: Shard
    kind: str  # "responses", "predictions"
    source: str  # "teacher", "student"
    mask_ratio: float | None
    stage: int
    samples: int
    sampling: dict

    @property
    def fingerprint(self) -> str:
        return fingerprint(
            dict(
                version=VERSION, kind=self.kind, model=self.answerer.digest, source=self.source,
                mask_ratio=self.mask_ratio, masks=self.answerer.thresholds_fingerprint if self.mask_ratio else None,
                stage=self.stage, samples=self.samples, sampling=self.sampling, questions=self.shard.questions,
                name=self.answerer.name,
            )
        )  # fmt: skip

    @property
    def file(self) -> str:
        return f"shards/{self.kind}/{self.fingerprint}.parquet"

    def job(self) -> dict:
        refs = [[r.digest, r.question_id, r.file, r.row] for r in self.shard.refs]
        return dict(
            out=self.file, kind=self.kind, model=self.answerer.name, mask_ratio=self.mask_ratio, stage=self.stage,
            source=self.source, samples=self.samples, sampling=self.sampling, refs=refs,
        )  # fmt: skip


def missing(storage: Storage, orders: list[Order]) -> list[Order]:
    """Orders whose shard is not there, from one listing."""
    there = set(storage.names("shards"))
    return [order for order in orders if order.file not in there]


def fulfil(
    data: artifacts.Artifact,
    orders: list[Order],
    runtime: Runtime,
    folder: Path,
    on_progress: Callable[[int, int], None],
) -> dict:
    """Answer what is missing, one engine process per model. Returns how it ran, for the summary."""
    todo = missing(data.storage, orders)
    jobs: dict[tuple[str, str], list[Order]] = {}
    for order in todo:
        jobs.setdefault((order.answerer.digest, order.sampling["dtype"]), []).append(order)
    done, questions = 0, sum(len(order.shard.refs) for order in todo)

    def count(_: str, line: dict) -> None:
        nonlocal done
        done += line.get("questions", 0)
        on_progress(done, questions)

    on_progress(0, questions)
    children = [_child(part, data, runtime, folder) for part in jobs.values()]
    peak = processes.run(children, runtime.generate_workers, count)
    workers = min(runtime.generate_workers, len(children))
    return dict(engines=len(children), workers=workers, children_peak_mib=round(peak))


def gather(storage: Storage, identity: artifacts.Identity, orders: list[Order]) -> dict[str, str]:
    """Put the orders' shards into the artifact's table of their kind. Returns {name: SHA-256}."""
    files = {}
    for order in orders:
        name = f"{order.kind}/{order.fingerprint}.parquet"
        storage.copy(order.file, f"{identity.folder}/{name}")
        files[name] = digest(storage.read(order.file))
    return files


def _child(orders: list[Order], data: artifacts.Artifact, runtime: Runtime, folder: Path) -> processes.Child:
    """The process of one model's engine. Whoever answers with it unmasked needs no thresholds."""
    answerer = max((order.answerer for order in orders), key=lambda answerer: len(answerer.thresholds))
    # runs of one mask ratio, so that an engine is re-masked once a ratio
    ordered = sorted(orders, key=lambda o: (-(o.mask_ratio or 0.0), o.shard.prefix))
    job = dict(
        store=data.storage.uri(""), data=data.folder, folder=str(answerer.folder),
        dtype=orders[0].sampling["dtype"], runtime=runtime.model_dump(),
        thresholds={str(ratio): values for ratio, values in answerer.thresholds.items()},
        shards=[order.job() for order in ordered],
    )  # fmt: skip
    # one thread an engine: several engines side by side beat one that spreads tiny matrices over the cores
    environment = {"OMP_NUM_THREADS": "1"} if runtime.generate_workers > 1 else {}
    name = f"{answerer.name}-{answerer.digest[:8]}"
    return processes.Child(name, "masters.models.engine_worker", job, folder, environment)
