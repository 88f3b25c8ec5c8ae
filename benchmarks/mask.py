"""`python -m benchmarks mask`: all five thresholds of a large matrix; the memory that a checkpoint's masks take.

Memory rows are single runs, each in a fresh process, against twice the largest tensor: what is allowed.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch.nn.utils import prune

from benchmarks.measure import Row, compare, extra_mib, once, seconds
from masters.models.masking import group_thresholds, magnitude_thresholds, order_index, safetensors_tensors
from masters.models.model_loading import remask

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
    return rows + memory_rows(shape)


def memory_rows(shape: tuple[int, int]) -> list[Row]:
    """Extra memory of all thresholds and of masking a loaded model anew; four matrices a checkpoint."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        bits, limit = 8 * dtype.itemsize, 2 * dtype.itemsize * shape[0] * shape[1] / 2**20
        with TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), shape, dtype)
            for case, prepare in {"thresholds": thresholds_of, "masked anew": remask_of}.items():
                mine = extra_mib(partial(prepare, Path(folder)))
                rows.append(once(f"checkpoint, {bits}-bit, {case}, peak, once", "MiB", mine(), limit))
    return rows


def write_checkpoint(folder: Path, shape: tuple[int, int], dtype: torch.dtype, small: int = 0) -> None:
    """Four matrices of a shape, and `small` ones."""
    shapes = [shape] * 4 + [(64, 64)] * small
    tensors = {f"{n}.weight": matrix(each, n).to(dtype) for n, each in enumerate(shapes)}
    save_file(tensors, folder / "model.safetensors")


def matrix(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def kth_values(weight: torch.Tensor) -> list[float]:
    magnitude = weight.abs().flatten().float()
    return [magnitude.kthvalue(order_index(ratio, len(magnitude)) + 1).values.item() for ratio in RATIOS]


def pruned(weight: torch.Tensor) -> None:
    for ratio in RATIOS:
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(weight.clone())
        prune.l1_unstructured(module, "weight", amount=ratio)


def thresholds_of(folder: Path) -> Callable[[], object]:
    group_thresholds(lambda: [("warm.weight", torch.ones(2, 2))], RATIOS, "matrix")  # imports and first calls
    return partial(group_thresholds, partial(safetensors_tensors, folder), RATIOS, "matrix")


class Matrices(torch.nn.ModuleDict):
    """Nothing but what `remask` asks of a model: weights by the checkpoint's names."""

    base_model_prefix = ""


def remask_of(folder: Path) -> Callable[[], object]:
    """A model of the checkpoint's matrices, its weights in memory, to be masked in place."""
    model, thresholds = Matrices(), {}
    for name, tensor in safetensors_tensors(folder):
        layer = torch.nn.Linear(1, 1, bias=False)
        layer.weight = torch.nn.Parameter(tensor.clone())
        model[name.removesuffix(".weight")] = layer
        thresholds[name] = 0.01
    remask(model, folder, {})  # imports
    return partial(remask, model, folder, thresholds)
