"""`python -m benchmarks` measures what it says, here at sizes that take a moment."""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import Benchmark, benchmark, end_to_end, engine, gpu, gpu_rows, head, large, mask, scale, step
from benchmarks import __main__ as command
from benchmarks.measure import Row, compare, extra_mib, seconds
from masters.common.errors import MastersError
from masters.config import Rewards, Train
from masters.models.losses import chunked_head
from tests import allocates_64_mib

SHAPE = step.Shape((8, 6), words=5, response=6)
SMALL = head.Sizes(tokens=16, vocabulary=3000, student=8, teacher=12)


def test_memory_is_that_of_the_call_alone() -> None:
    assert 60 < extra_mib(allocates_64_mib.prepared)() < 80


def test_medians_ratio_and_spread() -> None:
    ours, baseline = iter([2.0, 1.0, 9.0]), iter([8.0, 4.0, 6.0])
    row = compare("case", "s", lambda: next(ours), lambda: next(baseline), 3).as_dict()
    assert row == dict(case="case", ours=2, baseline=6, unit="s", ratio=3, spread=((1, 9), (4, 8)))
    assert seconds(lambda: time.sleep(0.02))() >= 0.02


def test_the_heads_ways_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, whole logits and TRL agree on the divergence; Liger's is half of it, and half a cross-entropy."""
    found = {}
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: found.__setitem__(len(found), self.item()))
    for way in (head.chunked, head.dense, head.trl, head.liger):
        head.prepared(way, SMALL)()
    ours, dense, trl, liger = found.values()
    assert ours == pytest.approx(dense, rel=1e-5)

    def divergence(student, teacher, token_T):
        return chunked_head.terms(student, teacher, token_T, "jsd").divergence_T.mean()

    head.prepared(divergence, SMALL)()
    jsd = found[4]
    assert trl == pytest.approx(jsd * SMALL.tokens, rel=1e-4)  # its "batchmean" sums over a sequence
    assert liger == pytest.approx(0.5 * jsd + 0.5 * (ours - jsd), rel=1e-4)


def test_both_sides_of_the_step_benchmark_compute_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without R_distill: min-max stretches the little that random models' D differ by, and its rounding with it."""
    monkeypatch.setattr(step, "REWARDS", Rewards(distillation="off"))
    models, asked, found = step.random_models(), step.question(SHAPE), []
    for way in (step.packed_loss, step.separate_loss):
        step.step(models, asked, way)
        found.append(torch.cat([p.grad.flatten() for p in models.student.parameters() if p.grad is not None]))
    assert SHAPE.prompt == 17 and len(asked.responses) == 8
    assert (found[0] - found[1]).norm() / found[1].norm() < 1e-5
    assert found[1].norm() > 1


def complete(name: Benchmark, sizes: object) -> list[dict]:
    """The rows of a benchmark at a size."""
    rows = [row.as_dict() for row in benchmark(name)(sizes)]  # pyright: ignore
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
    assert len(complete(Benchmark(name), sizes)) >= 2


@pytest.mark.slow
def test_one_engine_answers_as_masked_checkpoints_do_and_sooner() -> None:
    row = complete(Benchmark.ENGINE, engine.Sizes(prompts=4, ratios=2, repeats=1))[0]
    assert row["ratio"] > 1


@pytest.mark.slow
def test_the_demo_and_the_plain_script_both_run_through() -> None:
    rows = complete(Benchmark.END_TO_END, end_to_end.Sizes(questions=16, r_max=0.0, repeats=1))
    assert [row["case"].rpartition(", ")[2] for row in rows] == ["whole", "generate", "train", "cpu"]
    for way in ("ours", "baseline"):
        whole, generate, train, cpu = (row[way] for row in rows)
        assert whole > generate + train and min(generate, train, cpu) > 1


@pytest.mark.slow
def test_a_large_run_is_as_large_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the configuration takes fewer questions."""
    text = large.CONFIG.read_text()
    assert "train_limit = 8000" in text
    monkeypatch.setattr(large, "CONFIG", tmp_path / "easyvqa.toml")
    large.CONFIG.write_text(text.replace("train_limit = 8000", "train_limit = 8"))
    found = large.run(40)
    assert (found["data"]["rows"], found["generate"]["rows"], found["score"]["rows"]) == (
        40 + large.EVALUATION,
        320,
        320,
    )
    assert found["packing"]["seconds"] > 0


@pytest.mark.parametrize("where", [large.on_files, large.on_s3])
def test_a_store_of_shards_is_written_listed_and_committed(where: Callable[[int], dict]) -> None:
    seconds = where(3)
    assert list(seconds) == ["write", "list", "commit"] and min(seconds.values()) > 0


def test_time_is_held_to_linear_growth_and_memory_to_none() -> None:
    def stages(seconds: float, mib: int) -> dict:
        train = dict(seconds=seconds, peak_mib=100, children_peak_mib=mib)
        return dict(data=dict(seconds=1.0, peak_mib=50), train=train, whole=dict(seconds=9.0))

    rows = [row.as_dict() for row in scale.rows({10: stages(2.0, 300), 40: stages(4.0, 700)})]
    found = {row["case"]: (row["ours"], row["baseline"], row["ratio"]) for row in rows}
    assert found["train, 40 questions, time"] == (4, 8, 2)
    assert found["train, 40 questions, memory"] == (800, 400, 0.5)
    assert found["data, 40 questions, memory"] == (50, 50, 1)
    assert found["whole, 40 questions, time"] == (9, 36, 4)
    assert len(rows) == 10


TINY = gpu.Model(64, 2, 96, 4, 2, 16, vocabulary=step.VOCABULARY, eye_width=32, eye_layers=3, eye_heads=2)


def test_flops_are_those_that_torch_counts() -> None:
    """In full squares, as plain attention computes them; causal pairs are counted below."""
    model, asked = gpu.model(TINY, "cpu", torch.float32), step.question(SHAPE)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        step.separate_states(model, asked).logits()
    square = replace(gpu.separate_work(SHAPE), pairs=8 * (SHAPE.prompt + SHAPE.response) ** 2)
    assert gpu.forward_flops(model, square) == counter.get_total_flops()


def test_pairs_are_those_that_the_mask_lets_see_each_other() -> None:
    model = gpu.model(TINY, "cpu", torch.float32)
    packed = step.pack([step.question(SHAPE)], model, step.FAMILY)
    work = gpu.packed_work(SHAPE)
    assert packed.inputs["input_ids"].numel() == work.tokens
    assert int(packed.inputs["attention_mask"].sum()) == work.pairs
    assert len(packed.token_U) == work.states
    separate = gpu.separate_work(SHAPE)
    assert (separate.tokens, separate.pairs) == (8 * 23, 8 * sum(range(1, 24)))


@pytest.mark.parametrize("train", [Train(), Train(compute_dtype="bfloat16")], ids=["float32", "bfloat16"])
def test_gpu_rows_of_a_step_at_a_size_for_a_cpu(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "peak_flops", lambda device: 1e9)
    monkeypatch.setattr(gpu, "REPEATS", 2)
    time_, tokens, share = gpu.step_rows(gpu.Sizes(TINY, TINY, SHAPE, 2, "cpu", train))
    assert tokens.ours == pytest.approx(2 * 8 * 6 / time_.ours)
    assert tokens.ours > tokens.spread[0][0] > 0 and tokens.spread[0][1] > tokens.ours
    model = gpu.model(TINY, "cpu", torch.float32)
    flops = 2 * 5 * gpu.forward_flops(model, gpu.packed_work(SHAPE))  # two questions, 3 + 1 + 1 passes of equal models
    assert share.ours == pytest.approx(100 * flops / time_.ours / 1e9)
    assert gpu_rows(Benchmark.STEP) == [] or torch.cuda.is_available()


def test_a_baseline_that_finds_other_thresholds_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask, "kth_values", lambda weight: [0.0] * 5)
    with pytest.raises(AssertionError, match="other thresholds"):
        mask.measured((64, 256))


@pytest.mark.parametrize("gpu_fails", [False, True])
def test_what_the_command_measured_is_kept_and_told(
    gpu_fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Also where rows of a GPU, which come last, fail."""

    def measured() -> list[Row]:
        naps = (seconds(partial(time.sleep, length)) for length in (0.01, 0.02))
        return [compare("two naps, short and long", "s", *naps, 3)]

    def broken(name: Benchmark) -> list:
        raise RuntimeError("CUDA error: no kernel image")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "benchmark", lambda name: measured)
    if gpu_fails:
        monkeypatch.setattr(command, "gpu_rows", broken)
    with pytest.raises(MastersError, match="GPU rows failed.*no kernel") if gpu_fails else nullcontext():
        command.bench(Benchmark.STEP, as_json=True)
    out, err = capsys.readouterr()
    told = json.loads(out.splitlines()[-1])
    assert told == json.loads((tmp_path / "runs/bench/step.json").read_text())
    assert told["name"] == "step" and len(told["rows"]) == 1
    assert told["rows"][0]["ratio"] == told["rows"][0]["baseline"] / told["rows"][0]["ours"] > 1
    assert "two naps" in err and len(out.splitlines()) == 1
