"""The context of a run: its configuration, what preflight found, and what its stages did so far."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from masters.checks.model_folder import AFTER, LocalModel, Server
from masters.checks.preflight import Ready
from masters.common.errors import StoreError
from masters.common.hashing import digest
from masters.common.machine import cache
from masters.config import Config, Teacher
from masters.config.mask_schedule import mask_stages
from masters.config.stages import Stage
from masters.execution.pool_request import StageRequest, Student, outside
from masters.execution.processes import Standing
from masters.models.generation.shards import ShardCache
from masters.store.artifacts import Artifact, Identity, Upstream
from masters.store.storage import work_folder
from masters.tasks.progress import CONSOLE, Progress
from masters.tracking.run_writer import RunWriter


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
        return mask_stages(self.config.r_max, self.config.mask_step)

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
        self, config: Config, ready: Ready, earlier: ShardCache | None = None, known: Artifact | None = None
    ) -> None:
        self.config, self.ready, self.storage = config, ready, ready.storage
        self.earlier, self.known = earlier or ShardCache(ready.storage), known

    def fetched(self, trained: Artifact) -> Path:
        """A trained student's folder on this machine. A copy is named by its content: built again, it is another."""
        return self.storage.download(f"{trained.folder}/model", cache() / "models" / trained.parts["model"][:32])

    def trained(self, trained: Artifact) -> LocalModel:
        """A trained student under its name in the predictions table."""
        return LocalModel(AFTER, self.fetched(trained), trained.parts["model"], trained)


class Run(Context):
    """One run of the pipeline: also where it tracks, what is built again, and what its stages did."""

    def __init__(self, context: Context, tracker: RunWriter, rebuild: frozenset[Stage] = frozenset()) -> None:
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

    def assignment(self, identity: Identity, upstream: Upstream, ahead: bool) -> StageRequest:
        """A stage of this run as references to what it is made from."""
        made = self.ready.student.made
        return StageRequest(
            key=digest(identity.folder.encode())[:32], tracked=self.tracker.current, stage=identity.stage,
            run=self.key, began=self.began,
            inputs={role: made.folder for role, made in upstream.items() if isinstance(made, Artifact)},
            outside=outside(upstream),
            models=[role.removeprefix("model ") for role in upstream if role.startswith("model ")],
            ahead=ahead, rebuild=sorted(self.rebuild), earlier=self.earlier.folders,
            known=self.known.folder if self.known else None,
            student=Student(name=self.ready.student.name, folder=made.folder) if made else None,
        )  # fmt: skip
