"""Everything that the functions of a training run share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from masters.config import Rewards, Train
from masters.models.distributed import Replicate, Sharding
from masters.models.families.base import Family
from masters.models.packing.prefix_tree import Question, TokenCounts
from masters.models.training.groups import Group, Step
from masters.models.training.history import HistoryWriter
from masters.models.training.job import RoundPart, TrainEvent
from masters.models.training.load_balancing import size_of
from masters.store.storage import Storage


@dataclass
class TrainContext:
    """Models, data and settings of a training run, as one rank has them."""

    student: torch.nn.Module
    teacher: torch.nn.Module | None  # None for objectives without a teacher
    remask: Callable[[int], None]  # masks the teacher in place for a mask stage
    family: Family
    train: Train
    rewards: Rewards
    groups: Sequence[Group]
    steps: list[Step]
    ratios: list[float]  # mask ratio of each mask stage
    question: Callable[[Group], Question]  # makes a group ready to pack
    storage: Storage
    checkpoints: str  # prefix in the store
    checkpoint_steps: int
    token_budget: int  # tokens of a forward pass; lowered when memory runs out
    report: Callable[[TrainEvent], None]
    reference: torch.nn.Module | None = None  # pi_ref: the student at the round's start; None if `train` needs none
    end_tokens: frozenset[int] = frozenset()  # tokens that end a response
    vocabulary: int | None = None  # number of the tokenizer's ids; further rows of a head stand for no token
    probe: list[Question] = field(default_factory=list)  # questions that only measure accuracy
    rank: int = 0
    world: int = 1
    sharding: Sharding = field(default_factory=Replicate)
    history: HistoryWriter = field(default_factory=HistoryWriter)
    token_counts: TokenCounts = TokenCounts()  # of this rank's training passes so far
    part: RoundPart = RoundPart()

    def __post_init__(self) -> None:
        self.group_tokens = [size_of(group) for group in self.groups]  # None where not known

    @property
    def last_step(self) -> int:
        """Number of this training's last step; the round's first step is 1."""
        return self.part.steps_before + len(self.steps)

    @property
    def round_steps(self) -> int:
        """Number of optimizer steps of the whole round."""
        return self.last_step + self.part.steps_after
