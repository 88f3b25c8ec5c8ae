"""`python -m benchmarks` measures what it says, here at sizes that take a moment."""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    Benchmark,
    end_to_end,
    engine,
    gpu,
    head,
    large,
    load_benchmark,
    mask,
    measure_on_gpu,
    scale,
    step,
)
from benchmarks import __main__ as command
from benchmarks.measure import Row, compare, make_memory_meter, make_timer
from masters.common.errors import MastersError
from masters.config import Train
from masters.models.losses import chunked_head
from tests import allocates_64_mib
from tests.models.paper import paper_rewards, paper_train

SHAPE = step.Shape((8, 6), words=5, response=6)
SMALL = head.Sizes(tokens=16, vocabulary=3000, student=8, teacher=12)


def test_a_memory_meter_measures_the_call_alone() -> None:
    assert 60 < make_memory_meter(allocates_64_mib.prepare)() < 80


def test_medians_ratio_and_spread() -> None:
    ours, baseline = iter([2.0, 1.0, 9.0]), iter([8.0, 4.0, 6.0])
    row = compare("case", "s", lambda: next(ours), lambda: next(baseline), 3).as_dict()
    assert row == dict(case="case", ours=2, baseline=6, unit="s", ratio=3, spread=((1, 9), (4, 8)))
    assert make_timer(lambda: time.sleep(0.02))() >= 0.02


def test_implementations_of_the_head_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, all logits at once and TRL agree on the divergence; Liger's loss is half of it and half a cross-entropy."""
    losses = {}
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: losses.__setitem__(len(losses), self.item()))
    for loss in (head.chunked_loss, head.dense_loss, head.trl_loss, head.liger_loss):
        head.prepare_pass(loss, SMALL)()
    ours, dense, trl, liger = losses.values()
    assert ours == pytest.approx(dense, rel=1e-5)

    def divergence(student, teacher, token_T):
        return chunked_head.token_terms(student, teacher, token_T, "jsd").divergence_T.mean()

    head.prepare_pass(divergence, SMALL)()
    jsd = losses[4]
    assert trl == pytest.approx(jsd * SMALL.tokens, rel=1e-4)  # its "batchmean" sums over a sequence
    assert liger == pytest.approx(0.5 * jsd + 0.5 * (ours - jsd), rel=1e-4)


def test_both_implementations_of_the_step_compute_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without R_distill: min-max stretches the little that random models' D differ by, and its rounding with it."""
    monkeypatch.setattr(step, "REWARDS", paper_rewards(distillation="off"))
    models, question, gradients = step.make_models(), step.make_question(SHAPE), []
    for loss in (step.packed_loss, step.separate_loss):
        step.run_step(models, question, loss)
        gradients.append(torch.cat([p.grad.flatten() for p in models.student.parameters() if p.grad is not None]))
    assert SHAPE.prompt == 17 and len(question.responses) == 8
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 1e-5
    assert gradients[1].norm() > 1


def measure_complete(name: Benchmark, sizes: object) -> list[dict]:
    """Return the rows of a benchmark at a size, after checks that they are complete."""
    rows = [row.as_dict() for row in load_benchmark(name)(sizes)]  # pyright: ignore
    assert len({row["case"] for row in rows}) == len(rows) >= 1
    for row in rows:
        assert row["unit"] in ("s", "MiB") and row["baseline"] >= 0 and row["ours"] >= 0
    assert all(row["baseline"] > 0 for row in rows if row["unit"] == "s")
    return rows


SLOW = pytest.mark.slow  # a fresh process for each measurement of memory


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        pytest.param("head", SMALL, marks=SLOW),
        pytest.param("mask", (64, 256), marks=SLOW),
        ("step", (SHAPE,)),
    ],
)
def test_rows_are_complete(name: str, sizes: object) -> None:
    assert len(measure_complete(Benchmark(name), sizes)) >= 2


@pytest.mark.slow
def test_one_engine_answers_as_masked_checkpoints_do_but_sooner() -> None:
    row = measure_complete(Benchmark.ENGINE, engine.Sizes(prompts=4, ratios=2, repeats=1))[0]
    assert row["ratio"] > 1


@pytest.mark.slow
def test_the_demo_and_the_plain_script_both_run_through() -> None:
    rows = measure_complete(Benchmark.END_TO_END, end_to_end.Sizes(questions=16, r_max=0.0, repeats=1))
    assert [row["case"].rpartition(", ")[2] for row in rows] == ["whole", "generate", "train", "cpu"]
    for side in ("ours", "baseline"):
        whole, generate, train, cpu = (row[side] for row in rows)
        assert whole > generate + train and min(generate, train, cpu) > 1


@pytest.mark.slow
def test_a_large_run_has_all_its_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the configuration takes fewer questions."""
    text = large.CONFIG.read_text()
    assert "train_limit = 8000" in text
    monkeypatch.setattr(large, "CONFIG", tmp_path / "easyvqa.toml")
    large.CONFIG.write_text(text.replace("train_limit = 8000", "train_limit = 8"))
    stages = large.run_stages(40)
    rows = {name: stages[name]["rows"] for name in ("data", "generate", "score")}
    assert rows == dict(data=40 + large.EVALUATION, generate=320, score=320)
    assert stages["packing"]["seconds"] > 0


@pytest.mark.parametrize("time_store", [large.time_store_on_files, large.time_store_on_s3])
def test_a_store_of_shards_is_written_listed_and_committed(time_store: Callable[[int], dict]) -> None:
    seconds = time_store(3)
    assert list(seconds) == ["write", "list", "commit"] and min(seconds.values()) > 0


def test_baselines_are_linear_time_and_constant_memory() -> None:
    def stages(seconds: float, mib: int) -> dict:
        train = dict(seconds=seconds, peak_mib=100, children_peak_mib=mib)
        return dict(data=dict(seconds=1.0, peak_mib=50), train=train, whole=dict(seconds=9.0))

    rows = [row.as_dict() for row in scale.make_rows({10: stages(2.0, 300), 40: stages(4.0, 700)})]
    values = {row["case"]: (row["ours"], row["baseline"], row["ratio"]) for row in rows}
    assert values["train, 40 questions, time"] == (4, 8, 2)
    assert values["train, 40 questions, memory"] == (800, 400, 0.5)
    assert values["data, 40 questions, memory"] == (50, 50, 1)
    assert values["whole, 40 questions, time"] == (9, 36, 4)
    assert len(rows) == 10


TINY = gpu.ModelShape(64, 2, 96, 4, 2, 16, vocabulary=step.VOCABULARY, vision_width=32, vision_layers=3, vision_heads=2)


def test_flops_are_those_that_torch_counts() -> None:
    """Count full squares of pairs, as plain attention computes them; the next test counts causal pairs."""
    model, question = gpu.make_model(TINY, "cpu", torch.float32), step.make_question(SHAPE)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        step.separate_states(model, question).logits()
    square = replace(gpu.separate_work(SHAPE), pairs=8 * (SHAPE.prompt + SHAPE.response) ** 2)
    assert gpu.forward_flops(model, square) == counter.get_total_flops()


def test_pairs_are_those_that_the_attention_mask_allows() -> None:
    model = gpu.make_model(TINY, "cpu", torch.float32)
    packed = step.pack([step.make_question(SHAPE)], model, step.FAMILY)
    work = gpu.packed_work(SHAPE)
    assert packed.inputs["input_ids"].numel() == work.tokens
    assert int(packed.inputs["attention_mask"].sum()) == work.pairs
    assert len(packed.token_U) == work.states
    separate = gpu.separate_work(SHAPE)
    assert (separate.tokens, separate.pairs) == (8 * 23, 8 * sum(range(1, 24)))


@pytest.mark.parametrize("train", [paper_train(), paper_train(compute_dtype="bfloat16")], ids=["float32", "bfloat16"])
def test_gpu_rows_of_a_step_at_a_size_for_a_cpu(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "peak_flops", lambda device: 1e9)
    monkeypatch.setattr(gpu, "REPEATS", 2)
    time_, tokens, share = gpu.measure_step(gpu.Sizes(TINY, TINY, SHAPE, 2, "cpu", train))
    assert tokens.ours == pytest.approx(2 * 8 * 6 / time_.ours)
    assert tokens.ours > tokens.spread[0][0] > 0 and tokens.spread[0][1] > tokens.ours
    model = gpu.make_model(TINY, "cpu", torch.float32)
    flops = 2 * 5 * gpu.forward_flops(model, gpu.packed_work(SHAPE))  # two questions, 3 + 1 + 1 passes of equal models
    assert share.ours == pytest.approx(100 * flops / time_.ours / 1e9)
    assert measure_on_gpu(Benchmark.STEP) == [] or torch.cuda.is_available()


def test_a_baseline_with_other_thresholds_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask, "kth_value_thresholds", lambda weight: [0.0] * 5)
    with pytest.raises(AssertionError, match="other thresholds"):
        mask.measure((64, 256))


@pytest.mark.parametrize("gpu_fails", [False, True])
def test_the_command_prints_and_keeps_its_rows(
    gpu_fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Also where GPU rows, which come last, fail."""

    def measure() -> list[Row]:
        return [compare("short and long", "s", lambda: 0.01, lambda: 0.02, 3)]

    def fail(name: Benchmark) -> list:
        raise RuntimeError("CUDA error: no kernel image")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "load_benchmark", lambda name: measure)
    if gpu_fails:
        monkeypatch.setattr(command, "measure_on_gpu", fail)
    with pytest.raises(MastersError, match="GPU rows failed.*no kernel") if gpu_fails else nullcontext():
        command.bench(Benchmark.STEP, as_json=True)
    out, err = capsys.readouterr()
    printed = json.loads(out.splitlines()[-1])
    assert printed == json.loads((tmp_path / "runs/bench/step.json").read_text())
    assert printed["name"] == "step" and len(printed["rows"]) == 1
    assert printed["rows"][0]["ratio"] == printed["rows"][0]["baseline"] / printed["rows"][0]["ours"] == 2
    assert "short and long" in err and len(out.splitlines()) == 1
