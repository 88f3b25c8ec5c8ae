"""The promotion gate's decision on every combination of champion, comparison and history."""

from dataclasses import replace

import pytest

from masters.config import Nightly
from masters.evaluation.candidate_comparison import Comparison
from masters.evaluation.promotion_decision import GateDecision, GateInputs, decide, decide_without_training

BETTER = Comparison(100, 100, 0.9, 0.5, 40, 0, 1e-9, {})
WORSE = Comparison(100, 100, 0.5, 0.9, 0, 40, 1.0, {})
EQUAL = Comparison(100, 100, 0.0, 0.0, 0, 0, 1.0, {})
UNPROVEN = Comparison(100, 100, 0.51, 0.5, 2, 1, 0.5, {})
INPUTS = GateInputs("m", 2, 1, None, BETTER, BETTER, was_rolled_back=False, is_new=True)
FIRST = replace(INPUTS, champion=None, comparison=None)


def decide_for(**changes: object) -> GateDecision:
    return decide(replace(INPUTS, **changes), Nightly())  # pyright: ignore[reportArgumentType]


def test_a_better_candidate_becomes_champion() -> None:
    decision = decide_for()
    assert (decision.outcome, decision.champion, decision.reasons, decision.regressions) == ("promoted", 2, [], [])
    assert decision.as_dict()["comparison"]["gained"] == 40


def test_a_worse_candidate_is_kept_with_its_regressions() -> None:
    decision = decide_for(comparison=WORSE)
    assert (decision.outcome, decision.champion) == ("kept", 1)
    assert decision.regressions and decision.regressions[0] in decision.reasons


def test_a_candidate_that_was_decided_on_before_is_no_change() -> None:
    assert decide_for(comparison=WORSE, is_new=False).outcome == "no change"
    assert decide_for(comparison=BETTER, is_new=False).outcome == "promoted"


def test_a_candidate_that_was_rolled_back_is_not_promoted() -> None:
    decision = decide_for(was_rolled_back=True)
    assert (decision.outcome, decision.champion, decision.regressions) == ("kept", 1, [])
    assert "version 2 was rolled back" in decision.reasons[0]


def test_the_first_candidate_becomes_champion() -> None:
    decision = decide(FIRST, Nightly())
    assert (decision.outcome, decision.champion, decision.reasons) == ("promoted", 2, ["the first champion"])
    assert "comparison" not in decision.as_dict()


@pytest.mark.parametrize("untrained", [EQUAL, WORSE, UNPROVEN])
@pytest.mark.parametrize("inputs", [INPUTS, FIRST], ids=["with a champion", "the first"])
def test_a_candidate_that_is_not_better_than_before_training_is_never_promoted(
    inputs: GateInputs, untrained: Comparison
) -> None:
    decision = decide(replace(inputs, with_untrained=untrained), Nightly())
    assert (decision.outcome, decision.champion, decision.regressions) == ("kept", inputs.champion, [])
    assert decision.reasons[-1].startswith("not proven better than before training")
    again = decide(replace(inputs, with_untrained=untrained, is_new=False), Nightly())
    assert (again.outcome, again.champion) == ("no change", inputs.champion)


def test_an_equal_candidate_is_not_promoted_at_any_p_value() -> None:
    decision = decide(replace(FIRST, with_untrained=EQUAL), Nightly(p_value=1.0))
    assert (decision.outcome, decision.champion) == ("kept", None)
    assert "(0.00%, now 0.00%): 0 questions gained, 0 lost" in decision.reasons[0]
    assert decide(replace(FIRST, with_untrained=UNPROVEN), Nightly(p_value=1.0)).outcome == "promoted"


def test_a_candidate_that_was_trained_from_the_champion_is_compared_with_it_once() -> None:
    assert decide_for(with_untrained=None).outcome == "promoted"
    assert len(decide_for(comparison=UNPROVEN, with_untrained=None).reasons) == 1


def test_a_model_that_lost_its_champion_gets_no_new_one() -> None:
    decision = decide(replace(FIRST, last_champion=1), Nightly())
    assert (decision.outcome, decision.champion) == ("kept", None) and "version 1 had" in decision.reasons[0]


def test_the_champion_as_candidate_changes_nothing() -> None:
    decision = decide_for(candidate=1, comparison=None, is_new=False)
    assert (decision.outcome, decision.champion) == ("no change", 1)


def test_without_training_the_champion_stays() -> None:
    entry = decide_without_training(3).as_dict()
    assert (entry["outcome"], entry["champion"], "candidate" in entry) == ("no change", 3, False)
