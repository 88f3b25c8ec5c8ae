"""Fixed limits that a healthy run keeps: one that goes wrong is said to do so within its first tenth.

Ours. At the end of each tenth of the steps the mean over its last quarter is compared with that over the run's first
steps, as many. It is said once for each limit; training goes on.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from masters.models.training import history
from masters.models.training.context import TrainContext
from masters.store import artifacts

Row = Mapping[str, float | None]  # a step's means, by name; what a step does not have is None or left out

FEWEST = 5  # steps in a mean: single steps differ by which questions they are of
FALL = 0.5  # nats a token
RARE_SHARE = 0.5
COLLAPSED = 0.1  # of the first entropy
HALVED = 0.5  # of the first share of greedy end tokens


@dataclass(frozen=True)
class Limit:
    """`is_crossed` is given the mean over the first steps, NaN if none of them has the column, and over the latest."""

    column: str
    is_crossed: Callable[[float, float], bool]
    says: str


def _fell(source: str) -> Limit:
    what = f"the mean log pi of the {source}'s right responses fell by more than {FALL} nats a token"
    return Limit(f"log_pi_right_{source}", lambda first, now: now < first - FALL, what)


LIMITS = (
    _fell("teacher"),
    _fell("student"),
    Limit(
        "rare_negatives_gradient",
        lambda _, now: now > RARE_SHARE,
        "more than half of the reward gradient's squared norm pushes down tokens that have pi < 0.001 already",
    ),
    Limit(
        "entropy",
        lambda first, now: now < COLLAPSED * first,
        "the entropy of the student's distribution fell below a tenth of what it was",
    ),
    Limit(
        "greedy_end",
        lambda first, now: now < HALVED * first,
        "the share of end tokens that are the student's greedy choice fell by more than half",
    ),
)


class RunWarnings:
    """Compares a round's latest steps with its first. A run that goes on reads its earlier steps from the history."""

    def __init__(self, job: TrainContext, done: int) -> None:
        """`done`: steps that are behind a checkpoint; what was said of them is said again, to a new reader. What was
        said of the parts of the round before this one is not."""
        self._job, self._every = job, max(1, job.round_steps // 10)
        self._window = max(FEWEST, self._every // 4)
        self._first: list[Row] = []
        self._latest: deque[Row] = deque(maxlen=self._window)
        self._said: set[str] = set()
        for folder in job.part.histories if done else ():
            for row in artifacts.load(job.storage, folder).rows("history"):
                self._look(row["step"], row, said_before=True)
        for row in history.steps(job.storage, job.checkpoints) if done else ():
            self.look(row["step"], row)

    def look(self, number: int, row: Row) -> None:
        """Take in a step's means; report a warning for every limit that is crossed at the end of a tenth."""
        self._look(number, row, said_before=False)

    def _look(self, number: int, row: Row, said_before: bool) -> None:
        if number <= self._window:
            self._first.append(row)
        self._latest.append(row)
        if number % self._every or number < 2 * self._window:  # the two means have no step in common
            return
        for limit in LIMITS:
            first, now = _mean(self._first, limit.column), _mean(self._latest, limit.column)
            if math.isnan(now) or limit.column in self._said or not limit.is_crossed(first, now):
                continue
            self._said.add(limit.column)
            if said_before:
                continue
            before = "not known" if math.isnan(first) else f"{first:.3g}"
            text = f"{limit.says} ({before} in the first steps, {now:.3g} now)"
            self._job.report(event="warning", step=number, name=limit.column, text=text)


def _mean(rows: Sequence[Row] | deque[Row], column: str) -> float:
    """Mean over the rows that have the column; NaN if none has."""
    known = [value for row in rows if (value := row.get(column)) is not None]
    return sum(known) / len(known) if known else math.nan
