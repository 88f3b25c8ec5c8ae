"""`masters bench` measures what it says, here at sizes that take a moment."""

import time
from typing import Literal

import pytest
import torch

from masters.benchmarks import Benchmark, benchmark, head, mask, step
from masters.benchmarks.measure import compare, extra_mib, seconds
from masters.config import Rewards
from masters.models import head as chunked_head

SHAPE = step.Shape((8, 6), words=5, response=6)
SMALL = head.Sizes(tokens=16, vocabulary=3000, student=8, teacher=12)


def held() -> object:
    return torch.zeros(64 << 18).add_(1)


def prepared():
    torch.zeros(1)
    return held


def test_memory_is_that_of_the_call_alone() -> None:
    assert 60 < extra_mib(prepared)() < 80


def test_medians_ratio_and_spread() -> None:
    ours, baseline = iter([2.0, 1.0, 9.0]), iter([8.0, 4.0, 6.0])
    row = compare("case", "s", lambda: next(ours), lambda: next(baseline), 3).as_dict()
    assert row == dict(case="case", ours=2, baseline=6, unit="s", ratio=3, spread=((1, 9), (4, 8)))
    assert 0.02 <= seconds(lambda: time.sleep(0.02))() < 1


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


@pytest.mark.parametrize(("distillation", "limit"), [("off", 1e-5), ("minmax", 5e-5)])
def test_a_packed_step_has_the_gradients_of_separate_sequences(
    distillation: Literal["off", "minmax"], limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random models' D_t are nearly equal: min-max stretches what little differs, and its rounding with it."""
    monkeypatch.setattr(step, "REWARDS", Rewards(distillation=distillation))
    student, teacher, asked, found = step.model(384, 8), step.model(512, 10), step.question(SHAPE), []
    for way in (step.packed_loss, step.separate_loss):
        step.step(student, teacher, asked, way)
        found.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    assert SHAPE.prompt == 17 and len(asked.responses) == 8
    assert (found[0] - found[1]).norm() / found[1].norm() < limit
    assert found[1].norm() > 1


@pytest.mark.parametrize("name", Benchmark)
def test_rows_are_complete(name: Benchmark) -> None:
    small = {"head": SMALL, "mask": (64, 256), "step": (SHAPE,)}[name]
    rows = [row.as_dict() for row in benchmark(name)(small)]
    assert len({row["case"] for row in rows}) == len(rows) >= 2
    for row in rows:
        assert row["unit"] in ("s", "MiB") and row["baseline"] >= 0 and row["ours"] >= 0
    assert all(row["baseline"] > 0 for row in rows if row["unit"] == "s")


def test_a_baseline_that_finds_other_thresholds_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask, "kth_values", lambda weight: [0.0] * 5)
    with pytest.raises(AssertionError, match="other thresholds"):
        mask.measured((64, 256))
