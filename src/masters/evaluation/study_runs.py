"""The runs of a study: the chosen learning rate and the accuracy of each arm, and the planned comparisons."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from masters.common.errors import MastersError
from masters.config.study_file import Comparison, Study
from masters.evaluation.study_results import Cell, Questions, Result
from masters.evaluation.study_statistics import difference, holm, interval

CONFIDENCE = 0.95


@dataclass
class StudyRuns:
    """The runs of a study so far: results of finished runs and errors of failed ones."""

    study: Study
    results: dict[Cell, Result] = field(default_factory=dict)
    errors: dict[Cell, str] = field(default_factory=dict)

    def validation_accuracy(self, arm: str) -> dict[float, float]:
        """Return mean validation accuracy by learning rate, for rates at which every tuning seed has finished."""
        means = {}
        for rate in self.study.rates(arm):
            runs = [self.results.get(Cell("tuning", arm, rate, seed)) for seed in self.study.tuning_seeds]
            if all(runs):
                means[rate] = statistics.mean(run.accuracy for run in runs if run)
        return means

    def chosen_rate(self, arm: str) -> float | None:
        """Return the rate with the best mean validation accuracy, the smallest of equals; None if none finished."""
        if len(rates := self.study.rates(arm)) == 1:
            return rates[0]
        means = self.validation_accuracy(arm)
        return max(means, key=lambda rate: (means[rate], -rate), default=None)

    def is_at_edge(self, arm: str) -> bool:
        """Return whether the chosen rate is the smallest or largest tried, so that one beyond it may be better."""
        rates = self.study.rates(arm)
        return len(rates) > 1 and self.chosen_rate(arm) in (rates[0], rates[-1])

    def test_results(self, arm: str) -> dict[int, Result]:
        """Return final results at the chosen rate, by seed."""
        if (rate := self.chosen_rate(arm)) is None:
            return {}
        found = {seed: self.results.get(Cell("final", arm, rate, seed)) for seed in self.study.seeds}
        return {seed: result for seed, result in found.items() if result}

    def check_steps(self) -> None:
        """Raise MastersError if arms without `different_steps` took different numbers of optimizer steps."""
        strict = {arm for arm, settings in self.study.arms.items() if not settings.different_steps}
        counts = sorted({(cell.arm, run.steps) for cell, run in self.results.items() if cell.arm in strict})
        if len({count for _, count in counts}) > 1:
            counted = ", ".join(f"{arm} {count}" for arm, count in counts)
            raise MastersError(
                f"study {self.study.name}: expected equal numbers of optimizer steps in all arms, found {counted}; "
                "change epochs, questions_per_step or coverage of an arm, or set its different_steps = true"
            )


def summarize_arm(found: StudyRuns, arm: str) -> dict:
    """Return an arm's chosen rate, and its accuracy on the test split with spread and interval over seeds."""
    tested = found.test_results(arm)
    accuracies = [run.accuracy for run in tested.values()]
    row = dict(
        arm=arm,
        learning_rate=found.chosen_rate(arm),
        at_edge=found.is_at_edge(arm),
        validation=[dict(learning_rate=rate, accuracy=mean) for rate, mean in found.validation_accuracy(arm).items()],
        seeds=len(tested),
        accuracy=None,
        standard_deviation=None,
        interval=None,
        untrained=None,
        gain=None,
        errors=[dict(run=cell.name, error=error) for cell, error in found.errors.items() if cell.arm == arm],
    )
    if accuracies:
        mean, untrained = statistics.mean(accuracies), next(iter(tested.values())).untrained
        row |= dict(accuracy=mean, untrained=untrained, gain=mean - untrained)
    if len(accuracies) > 1:
        spread = statistics.stdev(accuracies)
        error = spread / len(accuracies) ** 0.5
        row |= dict(standard_deviation=spread, interval=interval(mean, error, len(accuracies) - 1, CONFIDENCE))
    return row


def compare_arms(found: StudyRuns, questions: Mapping[str, Questions]) -> list[dict]:
    """Return the planned comparisons, with p-values corrected by Holm and simultaneous intervals by Bonferroni.

    `questions` are by digest. A comparison that cannot be made has an `error` and counts as p = 1 in the correction.
    """
    planned = found.study.comparisons
    rows = [_compare(found, pair, questions, 1 - (1 - CONFIDENCE) / len(planned)) for pair in planned]
    corrected = holm([row.get("p_value", 1.0) for row in rows])
    return [row | ({} if "error" in row else dict(corrected=p)) for row, p in zip(rows, corrected, strict=True)]


def _compare(found: StudyRuns, pair: Comparison, questions: Mapping[str, Questions], level: float) -> dict:
    better, than = found.test_results(pair.better), found.test_results(pair.than)
    seeds, named = sorted(better.keys() & than.keys()), dict(better=pair.better, than=pair.than)
    digests = {run.questions for seed in seeds for run in (better[seed], than[seed])}
    if len(digests) > 1:
        return named | dict(error="the arms were evaluated on different questions")
    if len(seeds) < 2:
        return named | dict(error=f"expected 2 seeds or more that both arms finished, found {len(seeds)}")
    correct = [np.stack([runs[seed].correct_Q for seed in seeds]) for runs in (better, than)]
    try:
        return named | difference(correct[0], correct[1], questions[digests.pop()].image_Q, level).as_dict()
    except MastersError as error:
        return named | dict(error=str(error))
