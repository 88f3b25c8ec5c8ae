"""`python -m benchmarks mask`: all five thresholds of a large matrix, and the memory that masks of a checkpoint take.

Memory rows are single runs, each in a fresh process. Their baseline is the limit: twice the largest tensor.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch.nn.utils import prune

from benchmarks.measure import Row, compare, make_memory_meter, make_row, make_timer
from masters.models.masking import group_thresholds, iterate_tensors, magnitude_thresholds, order_index
from masters.models.model_loading import remask

SHAPE = (4096, 14336)
RATIOS = [0.2, 0.15, 0.1, 0.05, 0.01]
REPEATS = 3


def measure(shape: tuple[int, int] = SHAPE) -> list[Row]:
    """Raises AssertionError if a baseline finds other thresholds."""
    weight = make_matrix(shape, 0)
    if magnitude_thresholds(weight, RATIOS) != kth_value_thresholds(weight):
        raise AssertionError("kthvalue finds other thresholds")
    timer = make_timer(partial(magnitude_thresholds, weight, RATIOS))
    baselines = {"five kthvalue": kth_value_thresholds, "five prune.l1_unstructured": prune_modules}
    rows = [
        compare(f"{shape[0]} x {shape[1]} bf16, {name}", "s", timer, make_timer(partial(baseline, weight)), REPEATS)
        for name, baseline in baselines.items()
    ]
    return rows + measure_memory(shape)


def measure_memory(shape: tuple[int, int]) -> list[Row]:
    """Return rows of finding all thresholds and of masking a loaded model again, for a checkpoint of four matrices."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        bits, limit = 8 * dtype.itemsize, 2 * dtype.itemsize * shape[0] * shape[1] / 2**20
        with TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), shape, dtype)
            for case, prepare in {"thresholds": prepare_thresholds, "masked anew": prepare_remask}.items():
                mib = make_memory_meter(partial(prepare, Path(folder)))()
                rows.append(make_row(f"checkpoint, {bits}-bit, {case}, peak, once", "MiB", [mib], [limit]))
    return rows


def write_checkpoint(folder: Path, shape: tuple[int, int], dtype: torch.dtype, small_matrices: int = 0) -> None:
    """Write four matrices of a shape, and some small ones."""
    shapes = [shape] * 4 + [(64, 64)] * small_matrices
    tensors = {f"{n}.weight": make_matrix(each, n).to(dtype) for n, each in enumerate(shapes)}
    save_file(tensors, folder / "model.safetensors")


def make_matrix(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def kth_value_thresholds(weight: torch.Tensor) -> list[float]:
    magnitude = weight.abs().flatten().float()
    return [magnitude.kthvalue(order_index(ratio, len(magnitude)) + 1).values.item() for ratio in RATIOS]


def prune_modules(weight: torch.Tensor) -> None:
    for ratio in RATIOS:
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(weight.clone())
        prune.l1_unstructured(module, "weight", amount=ratio)


def prepare_thresholds(folder: Path) -> Callable[[], object]:
    group_thresholds(lambda: [("warm.weight", torch.ones(2, 2))], RATIOS, "matrix")  # imports and first calls
    return partial(group_thresholds, partial(iterate_tensors, folder), RATIOS, "matrix")


class Matrices(torch.nn.ModuleDict):
    """A model with what `remask` needs: weights by the checkpoint's names."""

    base_model_prefix = ""


def prepare_remask(folder: Path) -> Callable[[], object]:
    """Load a model of the checkpoint's matrices, to be masked in place."""
    model, thresholds = Matrices(), {}
    for name, tensor in iterate_tensors(folder):
        layer = torch.nn.Linear(1, 1, bias=False)
        layer.weight = torch.nn.Parameter(tensor.clone())
        model[name.removesuffix(".weight")] = layer
        thresholds[name] = 0.01
    remask(model, folder, {})  # imports
    return partial(remask, model, folder, thresholds)
