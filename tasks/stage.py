"""What all stages share: a run's context, and building or reusing an artifact with its timing and tracking."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task, exponential_backoff

from masters import artifacts, memory
from masters.artifacts import Artifact, Identity, Upstream
from masters.assignment import Assignment, Student, outside
from masters.config import Config, Teacher
from masters.errors import ArtifactError, StoreError, TrackingError, WorkerLost
from masters.exclusive import alone
from masters.identity import digest
from masters.machine import cache
from masters.models.schedule import mask_stages
from masters.preflight import AFTER, LocalModel, Ready, Server
from masters.processes import Standing
from masters.reuse import Earlier
from masters.stages import Stage
from masters.storage import Storage
from masters.tasks.log import CONSOLE, log, warn
from masters.tasks.pools import handed_over
from masters.tasks.progress import Progress
from masters.tracking import Tracker

RETRIES = 2
BACKOFF = 10  # seconds before the first retry, twice that before the second
Build = Callable[[], tuple[dict[str, str], dict, dict]]  # files with digests, facts, how it ran


def retryable(_task: Task, _run: TaskRun, state: State) -> bool:
    """Whether another try may succeed: the store or a process failed, not the input or the code."""
    return isinstance(state.result(raise_on_failure=False), StoreError | TrackingError | WorkerLost)


# how every stage runs as a task: nothing of it is pickled; what a stage had finished before it failed is reused
STAGE: dict[str, Any] = dict(
    cache_policy=NO_CACHE, retries=RETRIES, retry_delay_seconds=exponential_backoff(BACKOFF),
    retry_condition_fn=retryable, persist_result=False,
)  # fmt: skip


def work_folder(storage: Storage) -> Path:
    """Where this machine works on a store. The jobs in it name the store: two stores must not share it."""
    remote = cache() / "work" / digest(storage.uri("").encode())[:16]
    return Path(storage.path(".work")) if storage.local else remote


@dataclass(frozen=True)
class MaskStage:
    """A mask stage that is answered, scored and trained by itself: `generate.refresh = "stage"`.

    `number`: 0 for the largest mask. `student`: who answers, with the weights that training has reached when the stage
    begins. `earlier`: the training of the mask stage before, None for the round's first. `later`: those that follow.
    """

    number: int
    student: LocalModel
    earlier: Artifact | None
    later: tuple[int, ...]


@dataclass(frozen=True)
class Round:
    """One teacher's turn in the chain, and the student as it is when the round starts, which is pi_ref.

    `only`: the mask stage that is worked on; None: all of them at once.
    """

    number: int
    config: Teacher
    teacher: LocalModel
    student: LocalModel
    only: MaskStage | None = None

    @property
    def suffix(self) -> str:
        """Of stage names: nothing in the first round, then "-2", "-3", ...; of a mask stage also "-mask0", ..."""
        own = "" if self.number == 1 else f"-{self.number}"
        return f"{own}-mask{self.only.number}" if self.only else own

    @property
    def ratios(self) -> list[float]:
        """The mask ratios of the round's stages, from r_max down to 0."""
        return mask_stages(self.config.r_max, self.config.step)

    @property
    def begins(self) -> bool:
        """Whether nothing of the round comes before."""
        return self.only is None or self.only.earlier is None

    @property
    def ends(self) -> bool:
        """Whether nothing of the round follows."""
        return self.only is None or not self.only.later

    @property
    def answering(self) -> LocalModel:
        """The student whose responses are learnt from."""
        return self.only.student if self.only else self.student


class Context:
    """What identities are made from: the configuration, what preflight found, and what earlier runs left.

    `earlier`: whose answers are kept question by question; `known`: whose training questions are left out.
    """

    def __init__(
        self, config: Config, ready: Ready, earlier: Earlier | None = None, known: Artifact | None = None
    ) -> None:
        self.config, self.ready, self.storage = config, ready, ready.storage
        self.earlier, self.known = earlier or Earlier(ready.storage), known

    def fetched(self, trained: Artifact) -> Path:
        """A trained student's folder on this machine. A copy is named by its content: built again, it is another."""
        return self.storage.download(f"{trained.folder}/model", cache() / "models" / trained.parts["model"][:32])

    def trained(self, trained: Artifact) -> LocalModel:
        """A trained student under its name in the predictions table."""
        return LocalModel(AFTER, self.fetched(trained), trained.parts["model"], trained)


class Run(Context):
    """One run of the pipeline: also where it tracks, what is built again, and what its stages did."""

    def __init__(self, context: Context, tracker: Tracker, rebuild: frozenset[Stage] = frozenset()) -> None:
        super().__init__(context.config, context.ready, context.earlier, context.known)
        self.tracker, self.rebuild = tracker, rebuild
        self.key, self.began = tracker.key, datetime.now(UTC)
        self.stages: list[dict] = []
        self.standing: Standing | None = None  # the student's engine, where it stays between mask stages
        self.made: dict[str, Artifact] = {}  # by stage, "generate-2" in a later round

    def work(self, identity: Identity) -> Path:
        """A local folder for a stage's job files, logs and downloads; not part of the store's artifacts."""
        folder = work_folder(self.storage) / f"{identity.kind}-{identity.fingerprint}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"work folder {folder} cannot be made: {error}") from error
        return folder

    def progress(self, identity: Identity, unit: str) -> Progress:
        """Where a stage tells how far it is."""
        return Progress(CONSOLE, self.config.name, identity.stage, unit)

    def rebuilds(self, identity: Identity) -> bool:
        return identity.kind in self.rebuild

    def pool(self, kind: str) -> str:
        """The work pool that a stage is handed on to; empty: it runs in this process."""
        pools, judge = self.config.runtime.pools, self.ready.judge
        by_a_model = self.config.rewards.accuracy == "llm" and not isinstance(judge, Server)
        pool_of: dict[str, str] = {
            Stage.DATA: pools.cpu,
            Stage.MASK: pools.cpu,
            Stage.GENERATE: pools.generate,
            Stage.SCORE: pools.generate if by_a_model else pools.cpu,
            Stage.TRAIN: pools.train,
            Stage.EVALUATE: pools.generate,
        }
        return pool_of.get(kind, "")

    def assignment(self, identity: Identity, upstream: Upstream, ahead: bool) -> Assignment:
        """A stage of this run as references to what it is made from."""
        made = self.ready.student.made
        return Assignment(
            key=digest(identity.folder.encode())[:32], tracked=self.tracker.current, stage=identity.stage,
            run=self.key, began=self.began,
            inputs={role: made.folder for role, made in upstream.items() if isinstance(made, Artifact)},
            outside=outside(upstream),
            models=[role.removeprefix("model ") for role in upstream if role.startswith("model ")],
            ahead=ahead, rebuild=sorted(self.rebuild), earlier=self.earlier.folders,
            known=self.known.folder if self.known else None,
            student=Student(name=self.ready.student.name, folder=made.folder) if made else None,
        )  # fmt: skip


def _discard(run: Run, identity: Identity, upstream: Upstream, forget: Callable[[], None]) -> None:
    """Make room for what is to be built again: what the run was asked to, once, however often it is cut short and goes
    on; and what was made from an input that was built again since and came out different.

    What another run built since this one began is as good.
    """
    mark = f"{identity.folder}/rebuilt-{run.key}"
    asked, found = run.rebuilds(identity) and not run.storage.exists(mark), None
    with suppress(ArtifactError):  # damaged: a reason to build again where that was asked for, else told
        found = artifacts.find(run.storage, identity)
    outdated = found is not None and artifacts.find(run.storage, identity, upstream) is None
    if not outdated and (not asked or (found and found.created > run.began)):
        return
    for version in run.tracker.registry.made_from(identity.fingerprint):
        warn(
            f"{identity.stage} of {version} is built again: if other bytes come of it, the lineage of that version no "
            "longer holds (`masters lineage` tells)"
        )
    artifacts.discard(run.storage, identity)
    if asked:
        forget()
        run.storage.write(mark, b"")


def _built(run: Run, build: Build) -> tuple[dict[str, str], dict, dict]:
    """What `build` gives. Raises StoreError, and so may try again, where something of the store is gone."""
    try:
        return build()
    except FileNotFoundError as error:
        raise StoreError(
            f"store {run.storage.uri('')}: {' '.join(str(error).split())} is not there any more"
        ) from error


def _here(
    run: Run, identity: Identity, upstream: Upstream, build: Build, forget: Callable[[], None]
) -> tuple[Artifact, str, dict]:
    """The artifact, built in this process, its outcome and how it ran; another run may have been first."""
    what = f"builds {identity.stage} of {run.config.name}: waiting for it"
    with alone(run.storage, identity.folder, run.work(identity), lambda who: warn(f"{who} {what}")) as check:
        _discard(run, identity, upstream, forget)
        if artifact := artifacts.find(run.storage, identity, upstream):  # it was built while this run waited
            return artifact, "reused", {}
        run.storage.sweep(identity.folder)
        files, facts, how = _built(run, build)
        check()
        return artifacts.commit(run.storage, identity, files, facts, upstream), "built", how


def build_or_reuse(
    run: Run, identity: Identity, upstream: Upstream, build: Build,
    forget: Callable[[], None] = lambda: None, ahead: bool = False,
) -> Artifact:  # fmt: skip
    """The artifact of this identity: found, or built, committed and tracked. Its outcome joins the run's stages.

    What is not there is built in this process, or by a worker of the stage's pool, which gets `ahead` passed on.

    `upstream` is everything that the stage reads: it goes into the record and into MLflow. Of the outcome, `peak_mib`
    is that of the building process while the stage ran, `children_peak_mib` that of the processes it started. `forget`:
    removes what lies elsewhere and would not be made again otherwise, when the stage is to be rebuilt.
    """
    began = time.monotonic()
    memory.forget_peak()
    artifact = None if run.rebuilds(identity) else artifacts.find(run.storage, identity, upstream)
    how, outcome = {}, "reused"
    with run.tracker.stage(identity, upstream) as tracked:
        if artifact is None and (pool := run.pool(identity.kind)):
            wanted = run.assignment(identity, upstream, ahead)
            folder, outcome, how = handed_over(run.config, run.storage, pool, wanted)
            artifact = artifacts.load(run.storage, folder)
        elif artifact is None:
            artifact, outcome, how = _here(run, identity, upstream, build, forget)
        done = dict(
            name=identity.stage, fingerprint=artifact.fingerprint, uri=artifact.uri, outcome=outcome,
            rows=artifact.facts.get("rows", 0), rejected=artifact.facts.get("rejected", 0),
            seconds=round(time.monotonic() - began, 2), peak_mib=round(memory.peak_mib()),
        ) | how  # fmt: skip
        done["mlflow_run_id"] = tracked(artifact, done)
    run.stages.append(done)
    run.made[identity.stage] = artifact
    line = f"{identity.stage:<12} {outcome:<7} {done['rows']:>8} rows {done['seconds']:>8.1f} s"
    CONSOLE.print(line, highlight=False)
    log("info", f"{' '.join(line.split())}: {artifact.uri}")
    return artifact
