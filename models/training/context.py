"""All that a training run needs, in one place, so that its parts are free functions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from masters.config import Rewards, Train
from masters.models.distributed import Replicate, Sharding
from masters.models.families.base import Family
from masters.models.packing.prefix_tree import Question, Sizes
from masters.models.training.groups import Group, Step
from masters.models.training.history import HistoryWriter
from masters.models.training.microbatches import size_of
from masters.models.training.round_part import Part
from masters.store.storage import Storage


@dataclass
class TrainContext:
    """All that a training run needs. `question` makes a group ready to pack.

    `teacher` is None where the objective has none; `remask` masks it for a stage, in place, at that one of `ratios`.
    `reference`: pi_ref, the student as it was at the round's start, None where `train` does not hold it. `end_tokens`:
    those that end a response. `token_budget`: tokens of a forward pass; it becomes less where memory does not hold one.
    `probe`: questions that are looked at while it trains. `sharding`: how the models are held over the ranks. `ledger`
    collects the rows of the tables, `tally` the sizes of this rank's training passes. `part`: where in its round the
    training lies, whose steps are counted through.
    """

    student: torch.nn.Module
    teacher: torch.nn.Module | None
    remask: Callable[[int], None]
    family: Family
    train: Train
    rewards: Rewards
    groups: Sequence[Group]
    steps: list[Step]
    ratios: list[float]
    question: Callable[[Group], Question]
    storage: Storage
    checkpoints: str  # prefix in the store
    checkpoint_steps: int
    token_budget: int
    report: Callable[..., None]
    reference: torch.nn.Module | None = None
    end_tokens: frozenset[int] = frozenset()
    probe: list[Question] = field(default_factory=list)
    rank: int = 0
    world: int = 1
    sharding: Sharding = field(default_factory=Replicate)
    ledger: HistoryWriter = field(default_factory=HistoryWriter)
    tally: Sizes = Sizes()
    part: Part = Part()

    def __post_init__(self) -> None:
        self.sizes = [size_of(group) for group in self.groups]  # tokens of each, as the tables say

    @property
    def last_step(self) -> int:
        """The number of this training's last step, counted from the round's first, which is 1."""
        return self.part.steps_before + len(self.steps)

    @property
    def round_steps(self) -> int:
        """The steps of the whole round."""
        return self.last_step + self.part.steps_after
