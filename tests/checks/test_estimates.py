"""The work ahead, as docs/performance.md calculates it by hand, and against what PyTorch counts."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from masters.checks import estimates
from masters.checks.estimates import QuestionCounts, ParameterCounts
from masters.config import Config
from masters.config.loading import override_values
from masters.data.sources import RawRow
from masters.models.model_loading import load_model
from tests.models import tiny_models

STUDENT, TEACHER = ParameterCounts(8e9), ParameterCounts(38e9)
OF = QuestionCounts(train=1.0, evaluation=0.0, prompt=1000, image=0)
DEMO = Path(__file__).parents[2] / "demo" / "models"


def config(**values: object) -> Config:
    """Of the table in docs/performance.md, with other values by key (`__` stands for a dot)."""
    base = Config(
        name="large", store={"root": "x"}, data={"source": "x"}, student={"model": "s"}, teachers=[{"model": "t"}],
    )  # fmt: skip
    return override_values(base, {key.replace("__", "."): value for key, value in values.items()})


def test_the_table_of_the_documentation() -> None:
    found = estimates.estimate_flops(config(), STUDENT, [TEACHER], OF)
    expected = dict(generate=1.16e14, score=4.04e14, reference=2.42e13, train=7.26e13 + 1.15e14, evaluate=0.0)
    assert found == pytest.approx(expected, rel=5e-3)
    assert estimates.estimate_hours(found, 989e12)["score"] * 1.5e6 == pytest.approx(426, rel=5e-3)


def test_full_coverage_asks_every_teacher() -> None:
    found = estimates.estimate_flops(config(generate__coverage="full"), STUDENT, [TEACHER], OF)
    assert sum(found.values()) * 1.5e6 / (0.4 * 989e12) / 3600 == pytest.approx(2916, rel=5e-3)


def test_a_student_that_answers_at_every_mask_stage_costs_more_where_each_has_all_questions() -> None:
    ours = STUDENT.forward(OF, 4 * 64)
    for coverage, more in (("partition", 0), ("full", 4)):  # mask stages after the first
        once, anew = (
            estimates.estimate_flops(config(generate__coverage=coverage, generate__refresh=when), STUDENT, [TEACHER], OF)
            for when in ("round", "stage")
        )
        assert anew["generate"] - once["generate"] == pytest.approx(more * ours)
        assert anew["score"] == pytest.approx(once["score"] * (24 + 4 * more) / 24 if more else once["score"])
        assert anew["train"] == once["train"]


@pytest.mark.parametrize(
    ("values", "none"),
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
def test_what_a_configuration_leaves_out_costs_nothing(values: dict, none: set[str]) -> None:
    found = estimates.estimate_flops(config(**values), STUDENT, [TEACHER], OF)
    assert {stage for stage, count in found.items() if not count} == none | {"evaluate"}


def test_pi_ref_is_read_at_every_step_where_it_is_held_and_once_where_its_numbers_are_stored() -> None:
    once = 2 * 8e9 * (1000 + 8 * 64)
    for kl, epochs, expected in (("exact", 3, 3 * once), ("squared", 3, once), ("exact", 1, once)):
        found = estimates.estimate_flops(config(train__kl=kl, train__epochs=epochs), STUDENT, [TEACHER], OF)
        assert found["reference"] == pytest.approx(expected)


def test_fine_tuning_reads_no_teacher() -> None:
    values = dict(train__objective="sft", train__targets="labels")
    found = estimates.estimate_flops(config(**values), STUDENT, [TEACHER], OF)
    assert found["train"] == 3 * 2 * 8e9 * (1000 + 64)


def test_rows_are_counted_as_the_data_stage_splits_and_limits_them() -> None:
    class Rows:
        def rows(self):
            splits = ["train"] * 30 + ["test"] * 8 + [None] * 20 + ["else", 3]
            return iter(RawRow(str(n), split=split) for n, split in enumerate(splits))

    found = estimates.count_questions(config(data__eval_limit=9), Rows(), [(10, 4), (20, 6)])
    assert found == QuestionCounts(train=pytest.approx(30 + 0.9 * 22), evaluation=9, prompt=15, image=5)
    tuned = config(data__validation_share=0.25, evaluate__split="validation")
    found = estimates.count_questions(tuned, Rows(), [(10, 4), (20, 6)])
    assert found.train == pytest.approx(0.75 * 49.8) and found.evaluation == pytest.approx(0.25 * 49.8)


def test_a_forward_pass_costs_what_pytorch_counts() -> None:
    """Linear modules of text and head; attention's products are counted by PyTorch alone, and few here."""
    model = tiny_models.model("qwen3_vl", 0)
    ids_BL = torch.randint(*tiny_models.WORDS, (1, 8))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids_BL)
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 2}
    text = sum(n for name, n in sizes.items() if "visual" not in name and "embed" not in name and "lm_head" not in name)
    of = QuestionCounts(1, 0, prompt=0, image=0)
    expected = ParameterCounts(text, head=model.lm_head.weight.numel()).forward(of, said=8)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_weights_of_a_checkpoint_add_up_to_the_model() -> None:
    model, found = load_model(DEMO / "student", "float32"), estimates.count_parameters(DEMO / "student")
    assert found.text + found.vision + found.head == sum(p.numel() for p in model.parameters())
    assert found.head == model.lm_head.weight.numel() and found.vision > 0


def test_speed_is_that_of_real_products() -> None:
    assert 1e8 < estimates.measure_flops_per_second("cpu", "float32") < 1e15
