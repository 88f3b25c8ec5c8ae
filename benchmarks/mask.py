"""`masters bench mask`: all five thresholds of a large matrix, and of a checkpoint."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch.nn.utils import prune

from masters.benchmarks.measure import Row, compare, extra_mib, seconds
from masters.models.masking import group_thresholds, magnitude_thresholds, rank, safetensors_tensors

SHAPE = (4096, 14336)
RATIOS = [0.2, 0.15, 0.1, 0.05, 0.01]
REPEATS = 3


def measured(shape: tuple[int, int] = SHAPE) -> list[Row]:
    """Raises AssertionError if a baseline finds other thresholds."""
    weight = matrix(shape, 0)
    if magnitude_thresholds(weight, RATIOS) != kth_values(weight):
        raise AssertionError("kthvalue finds other thresholds")
    ours = seconds(partial(magnitude_thresholds, weight, RATIOS))
    others = {"five kthvalue": kth_values, "five prune.l1_unstructured": pruned}
    rows = [
        compare(f"{shape[0]} x {shape[1]} bf16, {name}", "s", ours, seconds(partial(way, weight)), REPEATS)
        for name, way in others.items()
    ]
    with TemporaryDirectory() as folder:
        save_file({f"layers.{n}.weight": matrix(shape, n) for n in range(4)}, Path(folder) / "model.safetensors")
        limit = 2 * weight.nbytes / 2**20  # the largest tensor twice
        mine = extra_mib(partial(thresholds_of, Path(folder)))
        rows.append(compare("checkpoint's peak, twice its largest tensor", "MiB", mine, lambda: limit, 1))
    return rows


def matrix(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def kth_values(weight: torch.Tensor) -> list[float]:
    magnitude = weight.abs().flatten().float()
    return [magnitude.kthvalue(rank(ratio, len(magnitude)) + 1).values.item() for ratio in RATIOS]


def pruned(weight: torch.Tensor) -> None:
    for ratio in RATIOS:
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(weight.clone())
        prune.l1_unstructured(module, "weight", amount=ratio)


def thresholds_of(folder: Path) -> Callable[[], object]:
    group_thresholds(lambda: [("warm.weight", torch.ones(2, 2))], RATIOS, "matrix")  # imports and first calls
    return partial(group_thresholds, partial(safetensors_tensors, folder), RATIOS, "matrix")
