"""The promotion gate's decision: whether tonight's student becomes champion, and why."""

from dataclasses import dataclass
from typing import Literal

from masters.config import Nightly
from masters.evaluation.candidate_comparison import Comparison

NO_CHAMPION = (
    "no version has the alias champion, which version {last} had: set it with `masters rollback {name} --to VERSION`"
)
ROLLED_BACK = "version {version} was rolled back: only `masters rollback {name} --to {version}` makes it champion again"
NOTHING_TO_TRAIN = (
    "no training question is new to the champion; a new teacher, withdrawn rows and changed evaluation rows take "
    "effect with the next new question (nightly.start = champion)"
)


@dataclass(frozen=True)
class GateInputs:
    """Everything that the decision depends on.

    `last_champion`: the version that had the alias champion last. `comparison`: candidate against champion; None if
    there is no champion or the candidate is the champion. `with_untrained`: candidate against the student before
    training; None if that is the champion. `is_new`: whether this night built the candidate, or no earlier night has
    decided on it.
    """

    name: str
    candidate: int
    champion: int | None
    last_champion: int | None
    comparison: Comparison | None
    with_untrained: Comparison | None
    was_rolled_back: bool
    is_new: bool


@dataclass(frozen=True)
class GateDecision:
    """The outcome of a night with its reasons. `champion`: the version that is champion after the decision."""

    outcome: Literal["promoted", "kept", "no change"]
    champion: int | None
    reasons: list[str]
    regressions: list[str]
    candidate: int | None = None
    comparison: Comparison | None = None

    def as_dict(self) -> dict:
        """Return the entry `nightly` of the summary."""
        entry: dict = dict(
            outcome=self.outcome, champion=self.champion, reasons=self.reasons, regressions=self.regressions
        )
        if self.candidate is not None:
            entry["candidate"] = self.candidate
        if self.comparison is not None:
            entry["comparison"] = self.comparison.as_dict()
        return entry


def decide(inputs: GateInputs, limits: Nightly) -> GateDecision:
    """Promote a candidate if nothing speaks against it: it must be better than the champion and than before training.

    The first candidate of a model has no champion to be compared with.
    """
    name, candidate, champion = inputs.name, inputs.candidate, inputs.champion
    not_promoted = "kept" if inputs.is_new else "no change"
    if champion is None and inputs.last_champion is not None:
        reason = NO_CHAMPION.format(name=name, last=inputs.last_champion)
        return GateDecision("kept", None, [reason], [], candidate)
    untrained = [] if inputs.with_untrained is None else untrained_objections(inputs.with_untrained, limits)
    if champion is None:
        if untrained:
            return GateDecision(not_promoted, None, untrained, [], candidate)
        return GateDecision("promoted", candidate, ["the first champion"], [], candidate)
    if inputs.comparison is None:
        return GateDecision(not_promoted, champion, ["the candidate is the champion itself"], [], candidate)
    reasons = objections(inputs.comparison, limits) + untrained
    if inputs.was_rolled_back:
        reasons.append(ROLLED_BACK.format(name=name, version=candidate))
    worse = regressions(inputs.comparison, limits)
    if reasons:
        return GateDecision(not_promoted, champion, reasons, worse, candidate, inputs.comparison)
    return GateDecision("promoted", candidate, [], worse, candidate, inputs.comparison)


def decide_without_training(champion: int | None) -> GateDecision:
    """Return the decision of a night in which nothing was trained."""
    return GateDecision("no change", champion, [NOTHING_TO_TRAIN], [])


def regressions(comparison: Comparison, limits: Nightly) -> list[str]:
    """Return why the candidate is worse: overall, or in a category by more than `max_category_drop`."""
    reasons = []
    if comparison.lost > comparison.gained:
        reasons.append(f"worse than the champion: {comparison.candidate:.2%} against {comparison.champion:.2%}")
    for name, category in comparison.categories.items():
        # in questions, not in shares: a drop of exactly the limit is allowed despite rounding
        if category.n * (category.champion - category.candidate) > limits.max_category_drop * category.n + 1e-9:
            drop = f"from {category.champion:.2%} to {category.candidate:.2%}"
            reasons.append(f"category {name or '(none)'} falls {drop}")
    return reasons


def objections(comparison: Comparison, limits: Nightly) -> list[str]:
    """Return the reasons why the candidate does not become champion; empty if it does."""
    reasons = regressions(comparison, limits)
    if comparison.lost <= comparison.gained and comparison.p_value >= limits.p_value:
        reasons.append(f"not proven better: {_describe_test(comparison, limits)}")
    return reasons


def untrained_objections(comparison: Comparison, limits: Nightly) -> list[str]:
    """Return why the candidate is not proven better than the student before training; empty if it is."""
    if comparison.gained > comparison.lost and comparison.p_value < limits.p_value:
        return []
    before, after = comparison.champion, comparison.candidate
    return [
        f"not proven better than before training ({before:.2%}, now {after:.2%}): {_describe_test(comparison, limits)}"
    ]


def _describe_test(comparison: Comparison, limits: Nightly) -> str:
    return (
        f"{comparison.gained} questions gained, {comparison.lost} lost, p = {comparison.p_value:.3f}, expected below "
        f"{limits.p_value}"
    )
