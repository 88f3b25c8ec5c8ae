"""The estimates against the hand calculation in docs/performance.md and against the FLOPs that PyTorch counts."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from masters.checks import estimates
from masters.checks.estimates import ParameterCounts, QuestionCounts
from masters.config import Config
from masters.config.loading import override_values
from masters.config.presets import section_values
from masters.data.question_selection import Role, Selection
from masters.models.model_loading import load_model
from masters.rewards.judge_probe import ProbeResult
from masters.rewards.judge_request import RequestStyle
from masters.rewards.verdict import Verdict
from tests.models import tiny_models

STUDENT, TEACHER = ParameterCounts(8e9), ParameterCounts(38e9)
QUESTIONS = QuestionCounts(train=1.0, evaluation=0.0, prompt=1000, image=0)
DEMO = Path(__file__).parents[2] / "demo" / "models"


def make_config(**values: object) -> Config:
    """Return the configuration of the table in docs/performance.md with other values (`__` stands for a dot)."""
    base = Config(
        name="large",
        store={"root": "x"},
        data={"source": "x"},
        student={"model": "s"},
        teachers=[{"model": "t"}],
        train=section_values("paper", "train"),
        rewards=section_values("paper", "rewards"),
    )
    return override_values(base, {key.replace("__", "."): value for key, value in values.items()})


def test_estimates_match_the_table_in_the_documentation() -> None:
    flops = estimates.estimate_flops(make_config(), STUDENT, [TEACHER], QUESTIONS)
    expected = dict(generate=1.16e14, score=4.04e14, reference=2.42e13, train=7.26e13 + 1.15e14, evaluate=0.0)
    assert flops == pytest.approx(expected, rel=5e-3)
    assert estimates.estimate_hours(flops, 989e12)["score"] * 1.5e6 == pytest.approx(426, rel=5e-3)


def test_full_coverage_uses_every_mask_ratio() -> None:
    flops = estimates.estimate_flops(make_config(generate__coverage="full"), STUDENT, [TEACHER], QUESTIONS)
    assert sum(flops.values()) * 1.5e6 / (0.4 * 989e12) / 3600 == pytest.approx(2916, rel=5e-3)


def test_refresh_by_stage_costs_more_only_with_full_coverage() -> None:
    generation = STUDENT.forward_flops(QUESTIONS, 4 * 64)
    for coverage, more in (("partition", 0), ("full", 4)):  # mask stages after the first
        once, refreshed = (
            estimates.estimate_flops(
                make_config(generate__coverage=coverage, generate__refresh=when), STUDENT, [TEACHER], QUESTIONS
            )
            for when in ("round", "stage")
        )
        assert refreshed["generate"] - once["generate"] == pytest.approx(more * generation)
        assert refreshed["score"] == pytest.approx(once["score"] * (24 + 4 * more) / 24 if more else once["score"])
        assert refreshed["train"] == once["train"]


@pytest.mark.parametrize(
    ("values", "stages_without_cost"),
    [
        (dict(train__beta=0.0), {"reference"}),
        (dict(train__beta=0.0, train__negatives="clipped"), set()),
        (dict(rewards__accuracy="rules"), {"score"}),
        (dict(rewards__judge="http://127.0.0.1:1/v1"), {"score"}),
        (dict(train__objective="kd"), {"reference", "score"}),
        (dict(train__objective="sft"), {"reference"}),
        (dict(train__objective="kd", train__targets="labels"), {"reference", "score", "generate"}),
        (dict(train__objective="sft", train__targets="labels"), {"reference", "score", "generate"}),
    ],
)
def test_stages_that_a_configuration_does_not_need_cost_nothing(values: dict, stages_without_cost: set[str]) -> None:
    flops = estimates.estimate_flops(make_config(**values), STUDENT, [TEACHER], QUESTIONS)
    assert {stage for stage, count in flops.items() if not count} == stages_without_cost | {"evaluate"}


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        (dict(), 100 * 8),
        (dict(generate__coverage="full"), 100 * (5 * 4 + 4)),
        (dict(generate__coverage="full", generate__refresh="stage"), 100 * 5 * 8),
        (dict(evaluate__accuracy="llm"), 100 * 8 + 3 * 10),
        (dict(evaluate__accuracy="llm", rewards__accuracy="rules"), 3 * 10),
        (dict(train__objective="kd"), 0),
        (dict(rewards__accuracy="rules"), 0),
    ],
)
def test_texts_that_a_judge_gets_are_counted(values: dict, texts: int) -> None:
    config = make_config(rewards__judge="http://127.0.0.1:1/v1", **values)
    assert estimates.count_judged_texts(config, QuestionCounts(train=100, evaluation=10, prompt=1, image=0)) == texts


def test_a_judge_server_costs_tokens_and_time() -> None:
    verdict, style = Verdict(1.0, "ok"), RequestStyle()
    config = make_config(rewards__judge="http://127.0.0.1:1/v1", runtime__judge_requests=4)
    questions = QuestionCounts(train=90_000, evaluation=0, prompt=1, image=0)
    for tokens, counted in ((500, "500 tokens each, as counted by the server: 3.6e+08 tokens"),
                            (0, "665 tokens each, as of the demo's judge: 4.8e+08 tokens")):  # fmt: skip
        line = estimates.describe_judging(config, questions, ProbeResult(verdict, 0.5, tokens, style, "", False))
        assert line.startswith("at most 720,000 texts") and counted in line and "25 hours at 4 requests" in line


def test_a_held_reference_costs_every_step_and_a_stored_one_once() -> None:
    once = 2 * 8e9 * (1000 + 8 * 64)
    for kl, epochs, expected in (("exact", 3, 3 * once), ("squared", 3, once), ("exact", 1, once)):
        flops = estimates.estimate_flops(make_config(train__kl=kl, train__epochs=epochs), STUDENT, [TEACHER], QUESTIONS)
        assert flops["reference"] == pytest.approx(expected)


def test_fine_tuning_on_labels_costs_no_teacher_pass() -> None:
    values = dict(train__objective="sft", train__targets="labels")
    flops = estimates.estimate_flops(make_config(**values), STUDENT, [TEACHER], QUESTIONS)
    assert flops["train"] == 3 * 2 * 8e9 * (1000 + 64)


def test_selected_questions_are_counted_by_split() -> None:
    selection = Selection(roles=bytearray([Role.TRAIN] * 6 + [Role.VALIDATION] * 2 + [Role.TEST] * 3 + [Role.UNUSED]))
    counts = estimates.count_questions(make_config(), selection, [(10, 4), (20, 6)])
    assert counts == QuestionCounts(train=6, evaluation=3, prompt=15, image=5)
    tuned = make_config(data__validation_share=0.25, evaluate__split="validation")
    assert estimates.count_questions(tuned, selection, [(10, 4)]).evaluation == 2


def test_forward_flops_match_those_that_pytorch_counts() -> None:
    """The products of attention are counted only by PyTorch, but there are few of them here."""
    model = tiny_models.model("qwen3_vl", 0)
    ids_BL = torch.randint(*tiny_models.WORDS, (1, 8))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids_BL)
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 2}
    text = sum(n for name, n in sizes.items() if "visual" not in name and "embed" not in name and "lm_head" not in name)
    questions = QuestionCounts(1, 0, prompt=0, image=0)
    expected = ParameterCounts(text, head=model.lm_head.weight.numel()).forward_flops(questions, response_tokens=8)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_counted_parameters_add_up_to_the_model() -> None:
    model, counts = load_model(DEMO / "student", "float32"), estimates.count_parameters(DEMO / "student")
    assert counts.text + counts.vision + counts.head == sum(p.numel() for p in model.parameters())
    assert counts.head == model.lm_head.weight.numel() and counts.vision > 0


def test_measured_speed_is_plausible() -> None:
    assert 1e8 < estimates.measure_flops_per_second("cpu", "float32") < 1e15
