"""The trainer's job and the progress events it reports: all that crosses the process boundary. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from masters.config import Rewards, Train
from masters.config.fields import Truncated
from masters.data.question_shards import QuestionRef
from masters.execution.events import Event


@dataclass(frozen=True)
class RoundPart:
    """The part of a round that a training covers: by default the whole round, else one mask stage of it.

    `steps_before`, `steps_after`: optimizer steps of the round before and after this part. `start_state`: store prefix
    of the state that the previous part ended with; `end_state`: store prefix for this part's own. Both are "" where
    there is none. `earlier_parts`: folders of the artifacts of the previous parts, in order.
    """

    steps_before: int = 0
    steps_after: int = 0
    start_state: str = ""
    end_state: str = ""
    earlier_parts: Sequence[str] = ()


class TrainJob(BaseModel):
    """Everything that the trainer processes need; `tasks.train` writes it, `models.training.worker` reads it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: str  # URI
    tables: dict[str, str]  # artifact folders by name: data, and where needed responses and verdicts
    refs: list[QuestionRef]  # questions to train on
    probe: list[QuestionRef]  # questions that only measure accuracy
    part: RoundPart
    mask_stage: int | None  # the only mask stage to train, None for all
    teacher: Path
    student: Path
    ratios: list[float]  # mask ratio of each mask stage
    thresholds: dict[float, dict[str, float]]  # magnitude threshold of each tensor, by mask ratio
    coverage: Literal["partition", "full"]
    truncated: Truncated
    train: Train
    rewards: Rewards
    checkpoints: str  # store prefix
    checkpoint_steps: int
    out: Path  # folder of the exported student
    token_budget: int
    sharding: Literal["replicate", "fsdp2"]
    activation_checkpointing: bool


class TrainingPlanned(Event):
    """Tables are read and steps are planned. `planned`: `passes` and `largest_pass` (tokens), empty if not known."""

    event: Literal["start"] = "start"
    groups: int
    steps: int
    empty_responses: int
    planned: dict[str, int]


class ModelsLoaded(Event):
    """`weights_share`: share of the student's weights that one process holds."""

    event: Literal["held"] = "held"
    processes: int
    weights_share: float
    sharding: str


class CheckpointRefused(Event):
    """A checkpoint is damaged or incomplete, and an earlier one is tried."""

    event: Literal["refused_checkpoint"] = "refused_checkpoint"
    reason: str


class TrainingResumed(Event):
    """`step`: last step of the checkpoint that training continues from."""

    event: Literal["resumed"] = "resumed"
    step: int
    total: int


class ReferenceProgress(Event):
    """Groups whose reference log-probabilities are computed."""

    event: Literal["reference"] = "reference"
    done: int
    total: int


class TeacherMasked(Event):
    """The teacher has the masks of this mask stage."""

    event: Literal["remask"] = "remask"
    stage: int
    seconds: float


class StepFinished(Event):
    """An optimizer step is done. `total`: steps of the round; `means`: columns of the table `history`."""

    event: Literal["step"] = "step"
    step: int
    total: int
    stage: int
    epoch: int
    seconds: float
    means: dict[str, float]


class ProbeMeasured(Event):
    """Accuracy on the probe questions after a step."""

    event: Literal["probe"] = "probe"
    step: int
    accuracy: float


class LimitCrossed(Event):
    """A mean crossed a limit that healthy runs keep. `name`: its column in the table `history`."""

    event: Literal["warning"] = "warning"
    step: int
    name: str
    text: str


class RolledBack(Event):
    """Probe accuracy dropped at step `at` to `accuracy`; training ends with the weights of step `to`."""

    event: Literal["rolled_back"] = "rolled_back"
    at: int
    accuracy: float
    to: int
    best: float


class TokenBudgetLowered(Event):
    """A rank ran out of memory and continues with smaller forward passes."""

    event: Literal["token_budget"] = "token_budget"
    rank: int
    tokens: int


class RestartRequested(Event):
    """A rank ran out of memory in a pass that needs all ranks: all must restart with this token budget."""

    event: Literal["again"] = "again"
    rank: int
    tokens: int


class PassesPacked(Event):
    """Token counts of all training passes: see `prefix_tree.TokenCounts`."""

    event: Literal["packed"] = "packed"
    passes: int
    separate: int
    packed_tokens: int
    padded: int


class StudentExported(Event):
    """The trained student is in the output folder. `dropped_settings`: of its generation_config.json."""

    event: Literal["exported"] = "exported"
    dropped_settings: list[str]


class Heartbeat(Event):
    """A rank other than 0 is alive; rank 0 reports for all."""

    event: Literal["alive"] = "alive"


TrainEvent = Annotated[
    TrainingPlanned
    | ModelsLoaded
    | CheckpointRefused
    | TrainingResumed
    | ReferenceProgress
    | TeacherMasked
    | StepFinished
    | ProbeMeasured
    | LimitCrossed
    | RolledBack
    | TokenBudgetLowered
    | RestartRequested
    | PassesPacked
    | StudentExported
    | Heartbeat,
    Field(discriminator="event"),
]
_ADAPTER: TypeAdapter[TrainEvent] = TypeAdapter(TrainEvent)


def parse_event(line: dict) -> TrainEvent:
    """Return a line of progress as its type."""
    return _ADAPTER.validate_python(line)
