"""Warnings when a run crosses a limit that healthy runs keep, from the end of its first tenth on.

Ours. At the end of each tenth of the steps, the mean over its last quarter is compared with the mean over as many steps
at the start of the round. Each limit is reported once; training continues.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from masters.models.training import history
from masters.models.training.context import TrainContext
from masters.models.training.job import LimitCrossed
from masters.store import artifacts

Row = Mapping[str, float | None]  # a step's means by name; None or absent where the step has none

MIN_STEPS = 5  # in a mean, because single steps differ by their questions
MAX_LOG_PI_DROP = 0.5  # nats per token
MAX_RARE_SHARE = 0.5
MIN_ENTROPY = 0.1  # of the entropy in the first steps
MIN_GREEDY_END = 0.5  # of the share in the first steps


@dataclass(frozen=True)
class Limit:
    """A limit on the means of one column of the table `history`."""

    column: str
    is_crossed: Callable[[float, float], bool]  # of the mean over the first steps, NaN if unknown, and over the latest
    message: str


def _log_pi_limit(source: str) -> Limit:
    message = f"the mean log pi of the {source}'s right responses fell by more than {MAX_LOG_PI_DROP} nats a token"
    return Limit(f"log_pi_right_{source}", lambda first, latest: latest < first - MAX_LOG_PI_DROP, message)


LIMITS = (
    _log_pi_limit("teacher"),
    _log_pi_limit("student"),
    Limit(
        "rare_negatives_gradient",
        lambda _, latest: latest > MAX_RARE_SHARE,
        "more than half of the reward gradient's squared norm pushes down tokens that have pi < 0.001 already",
    ),
    Limit(
        "entropy",
        lambda first, latest: latest < MIN_ENTROPY * first,
        "the entropy of the student's distribution fell below a tenth of what it was",
    ),
    Limit(
        "greedy_end",
        lambda first, latest: latest < MIN_GREEDY_END * first,
        "the share of end tokens that are the student's greedy choice fell by more than half",
    ),
)


class RunWarnings:
    """Compares a round's latest steps with its first ones and reports limits that are crossed."""

    def __init__(self, context: TrainContext, steps_done: int) -> None:
        """Read the `steps_done` earlier steps of the round from the history.

        Limits that this training crossed before it was interrupted are reported again, those of the round's previous
        parts are not.
        """
        self._context, self._interval = context, max(1, context.round_steps // 10)
        self._window = max(MIN_STEPS, self._interval // 4)
        self._first: list[Row] = []
        self._latest: deque[Row] = deque(maxlen=self._window)
        self._crossed: set[str] = set()
        if not steps_done:
            return
        for folder in context.part.earlier_parts:
            for row in artifacts.load(context.storage, folder).rows("history"):
                self.add_step(row["step"], row, reports=False)
        for row in history.steps(context.storage, context.checkpoints):
            self.add_step(row["step"], row)

    def add_step(self, number: int, row: Row, reports: bool = True) -> None:
        """Add a step's means. At the end of a tenth, report every limit that is newly crossed."""
        if number <= self._window:
            self._first.append(row)
        self._latest.append(row)
        if number % self._interval or number < 2 * self._window:  # the two means have no step in common
            return
        for limit in LIMITS:
            first, latest = _mean(self._first, limit.column), _mean(self._latest, limit.column)
            if math.isnan(latest) or limit.column in self._crossed or not limit.is_crossed(first, latest):
                continue
            self._crossed.add(limit.column)
            if reports:
                before = "not known" if math.isnan(first) else f"{first:.3g}"
                text = f"{limit.message} ({before} in the first steps, {latest:.3g} now)"
                self._context.report(LimitCrossed(step=number, name=limit.column, text=text))


def _mean(rows: Sequence[Row] | deque[Row], column: str) -> float:
    """Return the mean over the rows that have the column; NaN if none has."""
    known = [value for row in rows if (value := row.get(column)) is not None]
    return sum(known) / len(known) if known else math.nan
