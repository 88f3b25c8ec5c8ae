"""Has models answer shards: plans what is missing, has engines answer it, gathers the shards' files.

Generation and evaluation share it. A shard lies at `shards/<kind>/<fingerprint>.parquet` in the store, named by
what it was made from, so later runs and other artifacts reuse it; an artifact holds its own (hard-linked) copy.

Shards are fixed lists: planned afresh, one new question would change the shard that it falls into, and all of that
shard's questions would be answered again. So a night keeps an earlier run's shards (`Earlier`), cuts out what was
withdrawn, and plans only the rest. Every artifact that engines answered has the table `plan`, which says what each
shard holds.
"""

from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from masters.common.errors import StoreError
from masters.common.hashing import digest, fingerprint
from masters.config import Runtime
from masters.data import question_shards
from masters.data.question_shards import Ref, Shard
from masters.execution import engines, processes
from masters.store import artifacts, tables
from masters.store.artifacts import Artifact
from masters.store.storage import Storage

ENGINE = "masters.models.generation.worker"  # the module of the processes that answer
NO_SHARD = Shard("", ())  # of an order whose questions are still to be planned
PLAN = "plan"  # the table of what each shard holds
PLAN_ROWS = 100_000  # a file
VERSION = 3  # of what engines are asked and how rows are made; a new one makes new shards

Plan = dict[str, dict[str, list[tuple[str, str]]]]  # who was asked, shard, ids and digests of its questions


@dataclass(frozen=True)
class GeneratingModel:
    """A model that answers: its name in tables, folder, content digest and, masked, thresholds by ratio."""

    name: str
    folder: Path
    digest: str
    thresholds: dict[float, dict[str, float]]
    thresholds_fingerprint: str | None = None


@dataclass(frozen=True)
class ShardRequest:
    """A shard to be answered by someone in some way.

    `part_of` names the shard that this one is a part of, without some of its questions. `batch` holds all questions of
    that shard: where it is not in the store they are answered together, since what a question is answered depends on
    its batch, and the part alone is kept.
    """

    answerer: GeneratingModel
    shard: Shard
    kind: str  # "responses", "predictions"
    source: str  # "teacher", "student"
    mask_ratio: float | None
    stage: int
    samples: int
    sampling: dict
    stored: str | None = None  # the name of an earlier run's shard, or of a part of one
    part_of: str | None = None
    batch: tuple[Ref, ...] = ()

    @property
    def asker(self) -> str:
        """Who answers and how: everything but the questions."""
        return fingerprint(self._asked())

    @property
    def fingerprint(self) -> str:
        return self.stored or fingerprint(self._asked() | dict(questions=self.shard.questions))

    def _asked(self) -> dict:
        return dict(
            version=VERSION, kind=self.kind, model=self.answerer.digest, source=self.source,
            mask_ratio=self.mask_ratio, masks=self.answerer.thresholds_fingerprint if self.mask_ratio else None,
            stage=self.stage, samples=self.samples, sampling=self.sampling, name=self.answerer.name,
        )  # fmt: skip

    @property
    def file(self) -> str:
        return f"shards/{self.kind}/{self.fingerprint}.parquet"

    @property
    def whole(self) -> str:
        """The file of the shard that this one is a part of."""
        return f"shards/{self.kind}/{self.part_of}.parquet"

    @property
    def asked(self) -> tuple[Ref, ...]:
        """The questions that an engine answers as one batch."""
        return self.batch or self.shard.refs

    def job(self) -> dict:
        refs = [[r.digest, r.question_id, r.file, r.row] for r in self.asked]
        kept = [r.question_id for r in self.shard.refs]
        return dict(
            out=self.file, kind=self.kind, model=self.answerer.name, mask_ratio=self.mask_ratio, stage=self.stage,
            source=self.source, samples=self.samples, sampling=self.sampling, refs=refs, kept=kept,
        )  # fmt: skip


def missing_shards(storage: Storage, orders: list[ShardRequest]) -> list[ShardRequest]:
    """Orders whose shard is not there, from one listing."""
    there = set(storage.names("shards"))
    return [order for order in orders if order.file not in there]


def run_generation(
    data: artifacts.Artifact,
    orders: list[ShardRequest],
    runtime: Runtime,
    folder: Path,
    on_progress: Callable[[int, int, str], None],
    beside: processes.Child | None = None,
    stay: engines.Stay | None = None,
) -> dict:
    """Answer what is missing, at least one engine per model. Returns how it ran, for the summary.

    `on_progress` hears questions done, questions in all, and the shards as a note. `beside`: runs with the engines,
    if there are any, and is waited for; what it says it `judged` is counted. `stay`: see `engines.run`.
    """
    todo = []
    for order in missing_shards(data.storage, orders):
        if order.part_of and (not order.batch or data.storage.exists(order.whole)):
            _cut(data.storage, order)
        else:
            todo.append(order)
    jobs: dict[tuple[str, str], list[ShardRequest]] = {}
    for order in todo:
        jobs.setdefault((order.answerer.digest, order.sampling["dtype"]), []).append(order)
    done, shards, judged, questions = 0, 0, 0, sum(len(order.asked) for order in todo)

    def count(_: str, line: dict) -> None:
        nonlocal done, shards, judged
        judged += line.get("judged", 0)
        done += line.get("questions", 0)
        shards += "questions" in line
        on_progress(done, questions, f"{shards:,} of {len(todo):,} shards")

    on_progress(0, questions, f"0 of {len(todo):,} shards")
    work = [_work(part, data, runtime) for part in jobs.values()]
    how = engines.run(work, runtime, folder, count, [beside] if beside else [], stay)
    return how | ({"judged_ahead": judged} if beside else {})


def collect_shards(
    storage: Storage,
    identity: artifacts.Identity,
    orders: list[ShardRequest],
    completed: Callable[[bytes], bytes] | None = None,
) -> dict[str, str]:
    """Put the orders' shards into the artifact's table of their kind, and `plan` beside it. Returns {name: SHA-256}.

    `completed`: makes a file of the table from a shard, where it is more than a copy.
    """

    def put(order: ShardRequest) -> tuple[str, str]:
        name, data = f"{order.kind}/{order.fingerprint}.parquet", _proven(storage, order)
        if completed is None:
            storage.copy(order.file, f"{identity.folder}/{name}")
        else:
            data = completed(data)
            storage.write(f"{identity.folder}/{name}", data)
        return name, digest(data)

    with ThreadPoolExecutor(storage.at_once) as pool:
        files = dict(pool.map(put, orders))
    rows = _plan_rows(orders)
    for number, part in enumerate(iter(lambda: list(islice(rows, PLAN_ROWS)), [])):
        name, content = f"{PLAN}/{number:04d}.parquet", tables.encode(part, tables.PLAN)
        storage.write(f"{identity.folder}/{name}", content)
        files[name] = digest(content)
    return files


def _proven(storage: Storage, order: ShardRequest) -> bytes:
    """An order's shard. One that a disk or a server damaged is removed, to be answered again.

    Raises StoreError then: another try of the stage makes it anew.
    """
    data, expected = storage.read(order.file), order.samples * len(order.shard.refs)
    if (found := tables.rows_in(data)) != expected:
        storage.remove(order.file)
        what = "no Parquet file" if found is None else f"{found} rows"
        raise StoreError(f"shard {storage.uri(order.file)}: expected {expected} rows, found {what}; it was removed")
    return data


def _plan_rows(orders: list[ShardRequest]) -> Iterator[dict]:
    for order in orders:
        common = dict(asker=order.asker, kind=order.kind, shard=order.fingerprint)
        for question_id, question_digest in order.shard.questions:
            yield common | dict(question_id=question_id, question_digest=question_digest)


def _cut(storage: Storage, order: ShardRequest) -> None:
    """A shard of its own from an earlier one: without the questions that are withdrawn or changed."""
    table = tables.read(storage, order.whole)
    kept = {ref.question_id for ref in order.shard.refs}
    rows = [row for row in table.to_pylist() if row["question_id"] in kept]
    storage.create(order.file, tables.encode(rows, table.schema))


def _work(orders: list[ShardRequest], data: artifacts.Artifact, runtime: Runtime) -> engines.Work:
    """What one model is asked. Whoever answers with it unmasked needs no thresholds."""
    answerer = max((order.answerer for order in orders), key=lambda answerer: len(answerer.thresholds))
    # runs of one mask ratio, so that an engine is re-masked once a ratio
    ordered = sorted(orders, key=lambda o: (-(o.mask_ratio or 0.0), o.shard.prefix))
    setup = dict(
        store=data.storage.uri(""), data=data.folder, folder=str(answerer.folder),
        dtype=orders[0].sampling["dtype"], runtime=runtime.model_dump(),
        thresholds={str(ratio): values for ratio, values in answerer.thresholds.items()},
    )  # fmt: skip
    weights = sum(file.stat().st_size for file in answerer.folder.glob("*.safetensors"))
    return engines.Work(
        name=f"{answerer.name}-{answerer.digest[:8]}", module=ENGINE, setup=setup,
        pieces=[order.job() for order in ordered], folder=str(answerer.folder), digest=answerer.digest,
        # a token costs a pass over the weights
        cost=float(weights * sum(order.samples * len(order.asked) for order in orders)),
        environment=engines.ONE_THREAD if runtime.generate_workers > 1 else {},
    )  # fmt: skip


class ShardCache:
    """The shards of earlier artifacts that are still in the store."""

    def __init__(self, storage: Storage, artifacts: Iterable[Artifact] = ()) -> None:
        self._plan: Plan = {}
        found = list(artifacts)
        self.folders = [artifact.folder for artifact in found]
        there = set(storage.names("shards")) if found else set()
        for artifact in found:
            for row in artifact.rows(PLAN):
                if f"shards/{row['kind']}/{row['shard']}.parquet" in there:
                    held = self._plan.setdefault(row["asker"], {}).setdefault(row["shard"], [])
                    held.append((row["question_id"], row["question_digest"]))

    def orders(self, asked: ShardRequest, refs: list[Ref]) -> list[ShardRequest]:
        """Orders like `asked` for these questions: first from earlier shards, then planned afresh."""
        wanted = {(ref.question_id, ref.digest): ref for ref in refs}
        orders = []
        for name, held in self._plan.get(asked.asker, {}).items():
            # one artifact after another may name a shard: what is taken once is gone from `wanted`
            kept = tuple(sorted(wanted.pop(question) for question in dict.fromkeys(held) if question in wanted))
            if kept:
                orders.append(_of(asked, name, kept, whole=len(kept) == len(set(held))))
        fresh = [replace(asked, shard=shard) for shard in question_shards.plan(sorted(wanted.values()))]
        return sorted([*orders, *fresh], key=lambda order: order.shard.refs)


def narrowed(order: ShardRequest, wanted: Container[Ref]) -> ShardRequest | None:
    """The order without the questions that are not wanted; None if none is left.

    The others are answered exactly as the whole order has them answered: in the same batch.
    """
    kept = tuple(ref for ref in order.shard.refs if ref in wanted)
    if not kept or len(kept) == len(order.shard.refs):
        return order if kept else None
    whole, batch = (order.part_of, ()) if order.part_of else (order.fingerprint, order.shard.refs)
    shard = Shard(order.shard.prefix, kept)
    return replace(order, shard=shard, stored=fingerprint([whole, shard.questions]), part_of=whole, batch=batch)


def _of(asked: ShardRequest, name: str, kept: tuple[Ref, ...], whole: bool) -> ShardRequest:
    shard = Shard("", kept)
    if whole:
        return replace(asked, shard=shard, stored=name)
    return replace(asked, shard=shard, stored=fingerprint([name, shard.questions]), part_of=name)
