"""Thresholds against sorting in float64, which tensors are masked against the families' own modules."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from demo import families
from masters.models import masking
from masters.models.masking import (
    apply_mask,
    group_thresholds,
    is_masked,
    iterate_tensors,
    magnitude_thresholds,
    mask_group,
)
from masters.store import tables
from tests.models import float64_reference

RATIOS = [0.2, 0.15, 0.1, 0.05, 0.0]
MANY = [0.0, 0.05, 0.1, 0.29, 0.5, 0.99, 1.0]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def sorted_reference(weight: torch.Tensor, ratios: list[float]) -> list[float]:
    return [float64_reference.threshold(weight.double().numpy(), r) for r in ratios]


def awkward(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tiny = torch.finfo(dtype).smallest_normal
    normal = torch.randn(37, 53, dtype=torch.float64)
    return {
        "normal": (normal * 0.02).to(dtype),
        "ties": (normal.round() / 4).to(dtype),
        "all equal": torch.full((9, 7), -0.5, dtype=dtype),
        "zeros of both signs": torch.tensor([0.0, -0.0] * 20, dtype=dtype),
        "half zero": torch.where(normal > 0, normal, 0.0).to(dtype),
        "subnormal": (normal * tiny / 4).to(dtype),
        "infinite": torch.tensor([math.inf, -math.inf, 1.0, -2.0, 0.0, 3.0], dtype=dtype),
        "one": torch.tensor(-3.0, dtype=dtype),
        "largest": torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, 1.0], dtype=dtype),
        "neighbors": torch.nextafter(torch.ones(100), torch.arange(100) % 2 * 2.0).to(dtype),
        "not contiguous": normal.to(dtype).t()[::2],
        "4-D": torch.randn(3, 2, 5, 7).to(dtype),
    }


@dtypes
def test_thresholds_equal_the_sorted_reference(dtype: torch.dtype) -> None:
    for case, weight in awkward(dtype).items():
        assert magnitude_thresholds(weight, MANY) == sorted_reference(weight, MANY), case


@dtypes
def test_thresholds_across_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "CHUNK", 64)
    weight = awkward(dtype)["normal"]
    assert magnitude_thresholds(weight, MANY) == sorted_reference(weight, MANY)


bits32 = st.integers(0, 2**32 - 1).filter(lambda b: b & 0x7FFFFFFF <= 0x7F800000)


@given(st.lists(bits32, min_size=1, max_size=60), st.lists(st.integers(0, 100), min_size=1, max_size=5))
@example([1, 0x80000001, 2, 0x7F800000], [25, 50, 99])
def test_thresholds_of_any_float32(bits: list[int], percents: list[int]) -> None:
    weight = torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32))
    ratios = [p / 100 for p in percents]
    assert magnitude_thresholds(weight, ratios) == sorted_reference(weight, ratios)


@pytest.mark.parametrize("percent", range(101))
def test_the_rank_has_no_float_error(percent: int) -> None:
    weight = torch.arange(100, dtype=torch.float32)  # 0.29 * 100 is 28.999999999999996
    expected = math.inf if percent == 100 else float(percent)
    assert magnitude_thresholds(weight, [percent / 100]) == [expected]


@dtypes
@pytest.mark.parametrize("bad", [[1.0, math.nan], []])
def test_nan_and_empty_tensors_are_refused(dtype: torch.dtype, bad: list[float]) -> None:
    with pytest.raises(ValueError, match=r"NaN|empty"):
        magnitude_thresholds(torch.tensor(bad, dtype=dtype), RATIOS)


def test_other_types_and_ratios_are_refused() -> None:
    with pytest.raises(ValueError, match="int8"):
        magnitude_thresholds(torch.ones(3, dtype=torch.int8), RATIOS)
    for ratio in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="ratio"):
            magnitude_thresholds(torch.ones(3), [ratio])


@dtypes
def test_the_mask_keeps_weights_at_the_threshold(dtype: torch.dtype) -> None:
    weight = torch.tensor([[-3.0, 2.0], [-1.0, 0.5]], dtype=dtype)
    before = weight.clone()
    masked = apply_mask(weight, 1.0)
    assert masked.dtype == dtype
    assert masked.tolist() == [[-3.0, 2.0], [-1.0, 0.0]]
    assert torch.equal(apply_mask(weight, 0.0), before)
    assert not apply_mask(weight, math.inf).any()
    assert torch.equal(weight, before)


@given(st.lists(bits32, min_size=1, max_size=60), st.lists(st.integers(0, 100), min_size=2, max_size=5))
def test_masks_are_nested_and_equal_the_reference(bits: list[int], percents: list[int]) -> None:
    weight = torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32))
    ratios, zeroed = [p / 100 for p in sorted(percents)], torch.zeros(len(bits), dtype=torch.bool)
    for limit in magnitude_thresholds(weight, ratios):
        masked = apply_mask(weight, limit)
        np.testing.assert_array_equal(masked.numpy(), float64_reference.masked(weight.numpy(), limit))
        assert not (zeroed & (masked != 0)).any()  # what a smaller ratio zeroes, a larger one does
        zeroed = masked == 0


@dtypes
def test_masks_are_nested_and_zero_their_share(dtype: torch.dtype) -> None:
    weight = awkward(dtype)["normal"]
    ratios = [k / 20 for k in range(21)]
    kept = [apply_mask(weight, t) != 0 for t in magnitude_thresholds(weight, ratios)]
    for ratio, wider, narrower in zip(ratios[1:], kept, kept[1:], strict=False):
        assert not (narrower & ~wider).any()
        assert int((~narrower).sum()) <= max(ratio * weight.numel(), int((weight == 0).sum()))  # ties are kept
    distinct = torch.arange(1.0, 101.0).to(torch.float32)
    zeros = [int((apply_mask(distinct, t) == 0).sum()) for t in magnitude_thresholds(distinct, ratios)]
    assert zeros == [round(100 * r) for r in ratios]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", families.NAMES)
def test_linear_and_convolution_weights_are_masked(name: str, tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, model = families.build(name, tied)
    for parameter in model.parameters():  # constants (norms of ones) would not tell one tensor from another
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    saved = {content(t): n for n, t in iterate_tensors(tmp_path)}
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
    expected = {
        saved[content(module.weight)]
        for path, module in model.named_modules()
        if isinstance(module, kinds) and not path.endswith("lm_head")
    }
    masked = {n for n, t in iterate_tensors(tmp_path) if is_masked(n, t.ndim)}
    assert len(expected) > 15
    assert masked == expected


def content(tensor: torch.Tensor) -> tuple[tuple[int, ...], bytes]:
    return tuple(tensor.shape), tensor.detach().numpy().tobytes()


@pytest.mark.parametrize(
    ("name", "dimensions", "masked"),
    [
        ("model.visual.patch_embed.proj.weight", 5, True),
        ("model.vision_tower.embeddings.patch_embeddings.projection.weight", 4, True),
        ("model.multi_modal_projector.linear_1.weight", 2, True),
        ("model.visual.merger.mlp.0.weight", 2, True),
        ("model.visual.pos_embed.weight", 2, False),
        ("model.vision_tower.embeddings.position_embeddings", 3, False),
        ("model.vision_tower.embeddings.cls_token", 3, False),
        ("vision_model.embeddings.position_embedding.weight", 2, False),
        ("model.language_model.embed_tokens.weight", 2, False),
        ("lm_head.weight", 2, False),
        ("model.visual.merger.norm.weight", 1, False),
        ("model.visual.merger.ln_q.weight", 1, False),
        ("model.language_model.layers.0.self_attn.q_proj.bias", 1, False),
        ("model.vision_tower.encoder.layer.0.lambda_1", 1, False),
    ],
)
def test_is_masked_by_name(name: str, dimensions: int, masked: bool) -> None:
    assert is_masked(name, dimensions) is masked


def test_exclude_takes_patterns() -> None:
    name = "model.language_model.layers.0.mlp.gate_proj.weight"
    assert is_masked(name, 2, (r"self_attn",))
    assert not is_masked(name, 2, (r"mlp\.gate",))


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.language_model.layers.3.mlp.up_proj.weight", "model.language_model.layers.3"),
        ("model.visual.blocks.12.attn.qkv.weight", "model.visual.blocks.12"),
        ("model.vision_tower.encoder.layer.1.mlp.fc1.weight", "model.vision_tower.encoder.layer.1"),
        ("layers.0.mlp.up_proj.weight", "layers.0"),
        ("model.visual.merger.linear_fc1.weight", "model.visual.merger"),
        ("model.multi_modal_projector.linear_1.weight", "model.multi_modal_projector"),
    ],
)
def test_mask_group(name: str, block: str) -> None:
    assert mask_group(name, "block") == block
    assert mask_group(name, "matrix") == name
    assert mask_group(name, "global") == "all"


@pytest.mark.parametrize("granularity", ["matrix", "block", "global"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_group_thresholds(dtype: torch.dtype, granularity: str, tmp_path: Path) -> None:
    tensors = network(dtype)
    save_file({n: t for n, t in tensors.items() if "layers" in n}, tmp_path / "a.safetensors")
    save_file({n: t for n, t in tensors.items() if "layers" not in n}, tmp_path / "b.safetensors")
    ratios = [*RATIOS, 1.0]
    rows = group_thresholds(lambda: iterate_tensors(tmp_path), ratios, granularity, (r"excluded",))
    assert [(r["tensor"], r["mask_ratio"]) for r in rows] == [(n, r) for n in MASKED for r in ratios]
    for row in rows:
        group = [tensors[n].flatten() for n in MASKED if mask_group(n, granularity) == row["mask_group"]]
        assert row["threshold"] == sorted_reference(torch.cat(group), [row["mask_ratio"]])[0]
        weight = tensors[row["tensor"]]
        assert row["zeros"] == int((apply_mask(weight, row["threshold"]) == 0).sum())
        assert row["numel"] == weight.numel()
        assert row["sparsity"] == row["zeros"] / weight.numel()
    assert tables.decode(tables.encode(rows, tables.THRESHOLDS)).to_pylist() == rows


MASKED = [
    "model.layers.0.mlp.weight",
    "model.layers.0.q_proj.weight",
    "model.layers.1.mlp.weight",
    "model.merger.fc1.weight",
    "model.patch_embed.proj.weight",
]


def network(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    tensors = {n: torch.randn(17 + k, 11, dtype=dtype) * (k + 1) for k, n in enumerate(MASKED)}
    tensors[MASKED[1]][:9] = 0.0  # half zero already: threshold 0 and more zeros than the ratio
    tensors[MASKED[2]][3] = math.inf
    others = [
        "model.embed_tokens.weight",
        "model.layers.0.norm.weight",
        "model.layers.0.excluded.weight",
        "lm_head.weight",
    ]
    return tensors | {n: torch.full((4, 3), math.nan, dtype=dtype) for n in others}


@pytest.mark.parametrize(("granularity", "passes"), [("matrix", (1, 1)), ("block", (2, 3)), ("global", (2, 3))])
def test_number_of_reads_of_the_checkpoint(granularity: str, passes: tuple[int, int]) -> None:
    """Count reads for 16-bit and 32-bit floats; with one threshold per matrix each tensor is read once."""
    opened = []

    def tensors(dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        opened.append(dtype)
        yield "a.weight", torch.ones(5, 5, dtype=dtype)

    for dtype in DTYPES[:3]:
        assert len(group_thresholds(partial(tensors, dtype), [0.0, 1.0], granularity)) == 2
    assert [opened.count(dtype) for dtype in (torch.bfloat16, torch.float32)] == list(passes)


def test_group_thresholds_errors_name_the_tensor() -> None:
    good, bad = torch.ones(2, 2), torch.full((2, 2), math.nan)
    with pytest.raises(ValueError, match=r"b\.weight.*NaN"):
        group_thresholds(lambda: [("a.weight", good), ("b.weight", bad)], RATIOS, "matrix")
    with pytest.raises(ValueError, match=r"b\.weight.*float32.*float16"):
        group_thresholds(lambda: [("a.weight", good), ("b.weight", good.half())], RATIOS, "global")
    with pytest.raises(ValueError, match=r"a\.weight.*empty"):
        group_thresholds(lambda: [("a.weight", torch.ones(0, 2))], RATIOS, "matrix")
