"""Plan the shards that models answer, have engines answer the missing ones, and collect the shards' files.

Generation and evaluation share this module. A shard lies at `shards/<kind>/<fingerprint>.parquet` in the store. Its
name follows from its inputs, so later runs and other artifacts reuse it. Each artifact holds a (hard-linked) copy.

Shards are fixed lists of questions. If they were planned again, one new question would change the shard that it falls
into, and all questions of that shard would be answered again. So a nightly run keeps the shards of earlier runs
(`ShardCache`), cuts out withdrawn questions, and plans shards only for the rest. Every artifact with generated answers
has the table `plan`, which lists the questions of each shard.
"""

from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from masters.common.errors import StoreError
from masters.common.hashing import digest, fingerprint
from masters.config import Runtime, Sampling
from masters.data import question_shards
from masters.data.question_shards import QuestionRef, Shard
from masters.execution import engines
from masters.execution.engines import EngineWork, KeptEngine
from masters.execution.events import EngineEvent, ShardAnswered
from masters.execution.processes import WorkerModule
from masters.models.generation.job import GenerationSetup, ShardPiece
from masters.store import artifacts, tables
from masters.store.artifacts import Artifact
from masters.store.storage import Storage

WORKER_MODULE: str = WorkerModule.GENERATION
UNPLANNED = Shard("", ())  # the shard of a request whose questions are still to be planned
PLAN = "plan"  # the table that lists the questions of each shard
PLAN_FILE_ROWS = 100_000
VERSION = 3  # of requests and of how rows are made; a new version generates all shards again

# by request fingerprint and shard name, the ids and digests of the shard's questions
Plan = dict[str, dict[str, list[tuple[str, str]]]]


@dataclass(frozen=True)
class GeneratingModel:
    """A model that answers: its name in tables, folder, content digest and, if masked, thresholds by ratio."""

    name: str
    folder: Path
    digest: str
    thresholds: dict[float, dict[str, float]] = field(default_factory=dict)
    thresholds_fingerprint: str | None = None


@dataclass(frozen=True)
class ShardRequest:
    """A request that a model answers the questions of a shard, with a mask ratio and sampling settings.

    `stored_name` is the name of a shard of an earlier run. `part_of` names the shard from which this one takes some of
    the questions. `batch` holds all questions of that shard: a response depends on its batch, so where that shard is
    not in the store, all of them are answered together and only this request's are kept.
    """

    model: GeneratingModel
    kind: Literal["responses", "predictions"]
    source: str  # "teacher", "student", "evaluation"
    sampling: Sampling
    samples: int = 1
    mask_ratio: float | None = None
    stage: int = 0
    shard: Shard = UNPLANNED
    stored_name: str | None = None
    part_of: str | None = None
    batch: tuple[QuestionRef, ...] = ()

    @property
    def settings_fingerprint(self) -> str:
        """Fingerprint of everything but the questions."""
        return fingerprint(self._settings())

    @property
    def fingerprint(self) -> str:
        """Name of the shard's file."""
        return self.stored_name or fingerprint(self._settings() | dict(questions=self.shard.questions))

    def _settings(self) -> dict:
        """Return the literals that determine the responses, except the questions."""
        return dict(
            version=VERSION,
            kind=self.kind,
            model=self.model.digest,
            source=self.source,
            mask_ratio=self.mask_ratio,
            masks=self.model.thresholds_fingerprint if self.mask_ratio else None,
            stage=self.stage,
            samples=self.samples,
            sampling=self.sampling.to_identity(),
            name=self.model.name,
        )

    @property
    def file(self) -> str:
        return f"shards/{self.kind}/{self.fingerprint}.parquet"

    @property
    def whole_file(self) -> str:
        """The file of the shard that this one is a part of."""
        return f"shards/{self.kind}/{self.part_of}.parquet"

    @property
    def batch_refs(self) -> tuple[QuestionRef, ...]:
        """The questions that an engine answers as one batch."""
        return self.batch or self.shard.refs

    @property
    def rows(self) -> int:
        """Rows of the shard's file."""
        return self.samples * len(self.shard.refs)

    def to_piece(self) -> ShardPiece:
        """Return the piece of work for an engine."""
        return ShardPiece(
            out=self.file,
            kind=self.kind,
            model=self.model.name,
            source=self.source,
            mask_ratio=self.mask_ratio,
            stage=self.stage,
            samples=self.samples,
            sampling=self.sampling,
            refs=self.batch_refs,
            kept=tuple(ref.question_id for ref in self.shard.refs),
        )

    def restrict_to(self, questions: Container[QuestionRef]) -> "ShardRequest | None":
        """Return the request for some of its questions; None if none is left.

        They are answered exactly as in the whole request: in the same batch.
        """
        kept = tuple(ref for ref in self.shard.refs if ref in questions)
        if not kept or len(kept) == len(self.shard.refs):
            return self if kept else None
        whole, batch = (self.part_of, ()) if self.part_of else (self.fingerprint, self.shard.refs)
        shard = Shard(self.shard.prefix, kept)
        stored_name = fingerprint([whole, shard.questions])
        return replace(self, shard=shard, stored_name=stored_name, part_of=whole, batch=batch)


class ShardCache:
    """The shards of earlier artifacts that are still in the store."""

    def __init__(self, storage: Storage, artifacts: Iterable[Artifact] = ()) -> None:
        self._plan: Plan = {}
        artifacts = list(artifacts)
        self.folders = [artifact.folder for artifact in artifacts]
        stored = set(storage.names("shards")) if artifacts else set()
        for artifact in artifacts:
            for row in artifact.rows(PLAN):
                if f"shards/{row['kind']}/{row['shard']}.parquet" in stored:
                    questions = self._plan.setdefault(row["asker"], {}).setdefault(row["shard"], [])
                    questions.append((row["question_id"], row["question_digest"]))

    def plan_requests(self, template: ShardRequest, refs: list[QuestionRef]) -> list[ShardRequest]:
        """Return requests like `template` for these questions: for earlier shards, then for newly planned ones."""
        missing = {(ref.question_id, ref.digest): ref for ref in refs}
        requests = []
        for name, stored in self._plan.get(template.settings_fingerprint, {}).items():
            # several artifacts may name a shard: a question that is taken once is no longer missing
            kept = tuple(sorted(missing.pop(question) for question in dict.fromkeys(stored) if question in missing))
            if not kept:
                continue
            shard = Shard("", kept)
            if len(kept) == len(set(stored)):
                requests.append(replace(template, shard=shard, stored_name=name))
            else:
                part_name = fingerprint([name, shard.questions])
                requests.append(replace(template, shard=shard, stored_name=part_name, part_of=name))
        new = [replace(template, shard=shard) for shard in question_shards.plan_shards(sorted(missing.values()))]
        return sorted([*requests, *new], key=lambda request: request.shard.refs)


def find_missing(storage: Storage, requests: list[ShardRequest]) -> list[ShardRequest]:
    """Return the requests whose shard is not in the store, from one listing."""
    stored = set(storage.names("shards"))
    return [request for request in requests if request.file not in stored]


def run_generation(
    data: Artifact,
    requests: list[ShardRequest],
    runtime: Runtime,
    folder: Path,
    on_progress: Callable[[int, int, str], None],
    kept_engine: KeptEngine | None = None,
) -> dict:
    """Have engines answer the missing shards, at least one engine per model. Returns statistics for the summary.

    `on_progress` is called with the questions that are done, all questions, and a note about shards.
    `kept_engine`: see `engines.run`.
    """
    missing = []
    for request in find_missing(data.storage, requests):
        if request.part_of and (not request.batch or data.storage.exists(request.whole_file)):
            _cut_from_whole(data.storage, request)
        else:
            missing.append(request)
    by_model: dict[tuple[str, str], list[ShardRequest]] = {}
    for request in missing:
        by_model.setdefault((request.model.digest, request.sampling.dtype), []).append(request)
    done, shards, questions = 0, 0, sum(len(request.batch_refs) for request in missing)

    def show_progress() -> None:
        on_progress(done, questions, f"{shards:,} of {len(missing):,} shards")

    def count(event: EngineEvent) -> None:
        nonlocal done, shards
        if isinstance(event, ShardAnswered):
            done, shards = done + event.questions, shards + 1
        show_progress()

    show_progress()
    work = [_plan_work(group, data, runtime) for group in by_model.values()]
    return engines.run(work, runtime, folder, count, kept_engine)


def collect_shards(
    storage: Storage,
    identity: artifacts.Identity,
    requests: list[ShardRequest],
    convert: Callable[[bytes], bytes] | None = None,
) -> dict[str, str]:
    """Put the requests' shards into the artifact's table of their kind, and `plan` beside it. Returns {name: SHA-256}.

    `convert` makes a file of the table from a shard, where it is not a copy.
    """

    def put(request: ShardRequest) -> tuple[str, str]:
        name, data = f"{request.kind}/{request.fingerprint}.parquet", _read_complete(storage, request)
        if convert is None:
            storage.copy(request.file, f"{identity.folder}/{name}")
        else:
            data = convert(data)
            storage.write(f"{identity.folder}/{name}", data)
        return name, digest(data)

    with ThreadPoolExecutor(storage.max_threads) as pool:
        files = dict(pool.map(put, requests))
    rows = _plan_rows(requests)
    for number, part in enumerate(iter(lambda: list(islice(rows, PLAN_FILE_ROWS)), [])):
        name, content = f"{PLAN}/{number:04d}.parquet", tables.encode(part, tables.PLAN)
        storage.write(f"{identity.folder}/{name}", content)
        files[name] = digest(content)
    return files


def _read_complete(storage: Storage, request: ShardRequest) -> bytes:
    """Return the content of a request's shard.

    Raises StoreError if the shard is damaged, and removes it, so that a retry of the stage generates it again.
    """
    data = storage.read(request.file)
    if (found := tables.count_rows(data)) != request.rows:
        storage.remove(request.file)
        described = "no Parquet file" if found is None else f"{found} rows"
        raise StoreError(
            f"shard {storage.uri(request.file)}: expected {request.rows} rows, found {described}; it was removed"
        )
    return data


def _plan_rows(requests: list[ShardRequest]) -> Iterator[dict]:
    for request in requests:
        common = dict(asker=request.settings_fingerprint, kind=request.kind, shard=request.fingerprint)
        for question_id, question_digest in request.shard.questions:
            yield common | dict(question_id=question_id, question_digest=question_digest)


def _cut_from_whole(storage: Storage, request: ShardRequest) -> None:
    """Write the shard of a request with the rows that the whole shard has for its questions."""
    table = tables.read(storage, request.whole_file)
    kept = {ref.question_id for ref in request.shard.refs}
    rows = [row for row in table.to_pylist() if row["question_id"] in kept]
    storage.create(request.file, tables.encode(rows, table.schema))


def _plan_work(requests: list[ShardRequest], data: Artifact, runtime: Runtime) -> EngineWork:
    """Return the work for the engines of one model, which may be asked both masked and unmasked."""
    # an unmasked request has no thresholds
    model = max((request.model for request in requests), key=lambda model: len(model.thresholds))
    # by mask ratio, so that an engine changes its mask once per ratio
    ordered = sorted(requests, key=lambda request: (-(request.mask_ratio or 0.0), request.shard.prefix))
    setup = GenerationSetup(
        store=data.storage.uri(""),
        runtime=runtime,
        data=data.folder,
        folder=model.folder,
        dtype=requests[0].sampling.dtype,
        thresholds=model.thresholds,
    )
    weight_bytes = sum(file.stat().st_size for file in model.folder.glob("*.safetensors"))
    return EngineWork(
        name=f"{model.name}-{model.digest[:8]}",
        module=WORKER_MODULE,
        setup=setup,
        pieces=tuple(request.to_piece() for request in ordered),
        folder=model.folder,
        digest=model.digest,
        # a token costs a pass over the weights
        cost=float(weight_bytes * sum(request.samples * len(request.batch_refs) for request in requests)),
        environment=engines.ONE_THREAD if runtime.generate_workers > 1 else {},
    )
