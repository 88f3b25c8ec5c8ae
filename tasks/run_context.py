"""The context of a run: its configuration, the resources that preflight opened, and what its stages have built."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from masters.checks.model_folder import STUDENT_AFTER, JudgeServer, LocalModel, download_student
from masters.checks.preflight import Resources
from masters.common.errors import StoreError
from masters.common.hashing import digest
from masters.config import Config, Teacher
from masters.config.mask_schedule import mask_ratios
from masters.config.stages import Stage
from masters.execution.pool_request import StageRequest, Student, external_digests
from masters.execution.processes import PersistentProcess
from masters.models.generation.shards import ShardCache
from masters.rewards.judge_request import RequestStyle
from masters.store.artifacts import Artifact, Identity, Upstream
from masters.store.storage import work_folder
from masters.tasks.progress import CONSOLE, Progress
from masters.tracking.run_writer import RunWriter


@dataclass(frozen=True)
class MaskStage:
    """One mask stage that is generated, scored and trained by itself (`generate.refresh = "stage"`).

    `number`: 0 for the largest mask ratio. `student`: the model that generates, with the weights that training had
    reached when the stage began. `previous`: the train artifact of the mask stage before, None for the round's first.
    `remaining`: the numbers of the mask stages that follow.
    """

    number: int
    student: LocalModel
    previous: Artifact | None
    remaining: tuple[int, ...]


@dataclass(frozen=True)
class Round:
    """One teacher's turn in the chain. `student` is the model that the round starts from, the reference policy pi_ref.

    `mask_stage` restricts the round to one of its mask stages; None: all mask stages are built at once.
    """

    number: int
    config: Teacher
    teacher: LocalModel
    student: LocalModel
    mask_stage: MaskStage | None = None

    @property
    def suffix(self) -> str:
        """Suffix of the round's stage names: "", "-2", "-3", ...; a single mask stage adds "-mask0", "-mask1", ..."""
        number = "" if self.number == 1 else f"-{self.number}"
        return f"{number}-mask{self.mask_stage.number}" if self.mask_stage else number

    @property
    def ratios(self) -> list[float]:
        """The mask ratios of the round's mask stages, from r_max down to 0."""
        return mask_ratios(self.config.r_max, self.config.mask_step)

    @property
    def starts_round(self) -> bool:
        """Whether no other part of the round is trained before this one."""
        return self.mask_stage is None or self.mask_stage.previous is None

    @property
    def ends_round(self) -> bool:
        """Whether no other part of the round is trained after this one."""
        return self.mask_stage is None or not self.mask_stage.remaining

    @property
    def generating_student(self) -> LocalModel:
        """The student model that generates the responses to learn from."""
        return self.mask_stage.student if self.mask_stage else self.student


class Context:
    """Inputs of the identities: the configuration, the opened resources, and what earlier runs left.

    `shard_cache`: shards of earlier runs to reuse. `known_data`: a data artifact whose training questions are left out.
    """

    def __init__(
        self,
        config: Config,
        resources: Resources,
        shard_cache: ShardCache | None = None,
        known_data: Artifact | None = None,
    ) -> None:
        self.config, self.resources, self.storage = config, resources, resources.storage
        self.shard_cache, self.known_data = shard_cache or ShardCache(resources.storage), known_data
        self.judge_style: RequestStyle | None = None  # the parameters that the judge's server takes, once it was asked

    def load_student(self, trained: Artifact) -> LocalModel:
        """Describe the student of a train artifact, under its name in the predictions table."""
        return LocalModel(STUDENT_AFTER, download_student(trained), trained.part_digests["model"], trained)


class Run(Context):
    """One run of the pipeline: a context with its tracker, the stages to rebuild, and what its stages have built."""

    def __init__(self, context: Context, tracker: RunWriter, stages_to_rebuild: frozenset[Stage] = frozenset()) -> None:
        super().__init__(context.config, context.resources, context.shard_cache, context.known_data)
        self.tracker, self.stages_to_rebuild = tracker, stages_to_rebuild
        self.key, self.started_at = tracker.key, datetime.now(UTC)
        self.stages: list[dict] = []  # the summary's entries, in the order of building
        self.resident_engine: PersistentProcess | None = None  # the student's engine, if it is kept between mask stages
        self.artifacts: dict[str, Artifact] = {}  # by stage name, "generate-2" in a later round

    def work_folder(self, identity: Identity) -> Path:
        """Create a local folder for a stage's job files, logs and downloads. It is not part of the artifacts."""
        folder = work_folder(self.storage) / f"{identity.kind}-{identity.fingerprint}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"work folder {folder} cannot be created: {error}") from error
        return folder

    def track_progress(self, identity: Identity, unit: str) -> Progress:
        """Make the progress bar of a stage, which counts in `unit`."""
        return Progress(CONSOLE, self.config.name, identity.stage, unit)

    def must_rebuild(self, identity: Identity) -> bool:
        return identity.kind in self.stages_to_rebuild

    def pool_for(self, kind: str) -> str:
        """Return the work pool that builds stages of this kind; empty if this process builds them."""
        pools = self.config.runtime.pools
        uses_judge_model = self.config.rewards.accuracy == "llm" and not isinstance(self.resources.judge, JudgeServer)
        pool_by_kind: dict[str, str] = {
            Stage.DATA: pools.cpu,
            Stage.MASK: pools.cpu,
            Stage.GENERATE: pools.generate,
            Stage.SCORE: pools.generate if uses_judge_model else pools.cpu,
            Stage.TRAIN: pools.train,
            Stage.EVALUATE: pools.generate,
        }
        return pool_by_kind.get(kind, "")

    def stage_request(self, identity: Identity, upstream: Upstream, ahead: bool) -> StageRequest:
        """Describe a stage of this run for a worker of a pool, by references to what the stage reads."""
        artifact = self.resources.student.artifact
        student = Student(name=self.resources.student.name, folder=artifact.folder) if artifact else None
        return StageRequest(
            key=digest(identity.folder.encode())[:32],
            tracked=self.tracker.current_run_id,
            stage=identity.stage,
            run=self.key,
            began=self.started_at,
            inputs={role: source.folder for role, source in upstream.items() if isinstance(source, Artifact)},
            outside=external_digests(upstream),
            models=[role.removeprefix("model ") for role in upstream if role.startswith("model ")],
            ahead=ahead,
            rebuild=sorted(self.stages_to_rebuild),
            earlier=self.shard_cache.folders,
            known=self.known_data.folder if self.known_data else None,
            student=student,
        )
