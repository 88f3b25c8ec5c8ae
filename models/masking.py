"""Masked teachers (Eq. 1-2): weights with |w| < lambda_r are zero in a copy of the weights; nothing is pruned for good.

Ours, exactly: lambda_r is the magnitude at 0-based rank floor(r N) in ascending order; ties at the threshold are kept,
so the realized sparsity can fall short of r. r = 0 gives 0, r = 1 gives infinity. The paper takes thresholds per layer,
as one for the whole network prunes some layers until the model stops working; ours are per weight matrix by default.

Exact order statistics come from histograms: floats of one sign order like their bits read as integers, so a histogram
over the high magnitude bits (all 15 of a 16-bit float) finds the bucket of a rank; 32-bit floats take a second pass
over the low bits in that bucket. Where each matrix has its own threshold these passes run over one tensor while it is
in memory, so that a checkpoint is read once. Where blocks or the network share a threshold it is read once per pass.
"""

import math
import re
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open

from masters.common import safe_regex

CHUNK = 1 << 20  # elements counted or copied at a time
BUCKETS = 1 << 15  # values of a magnitude's 15 high bits
LOW_BITS = 16  # magnitude bits of a float32 below the high ones


class FloatBits(NamedTuple):
    """Bit layout of a float type's magnitude in an integer of the same width."""

    integer: torch.dtype
    magnitude: int  # all bits but the sign
    infinity: int  # NaNs lie above it


FLOAT_BITS = {
    torch.bfloat16: FloatBits(torch.int16, 0x7FFF, 0x7F80),
    torch.float16: FloatBits(torch.int16, 0x7FFF, 0x7C00),
    torch.float32: FloatBits(torch.int32, 0x7FFFFFFF, 0x7F800000),
}
NEVER_MASKED = re.compile(r"lm_head|embed_tokens|pos_embed|position_embedding|cls_token|class_embedding|norm|(^|\.)ln_")
BLOCK_NAME = re.compile(r"^((?:.*?\.)?(?:layers|layer|blocks|block|h)\.\d+)\.")

NamedTensors = Iterable[tuple[str, torch.Tensor]]
GroupedTensors = Iterator[tuple[str, str, torch.Tensor]]  # name, mask group, tensor


def order_index(ratio: float, count: int) -> int:
    """Return floor(r N) of Eq. 1-2, exact for decimal ratios: 0.29 * 100 is 29, where floats give 28."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"a mask ratio lies in [0, 1], found {ratio}")
    return math.floor(Fraction(str(ratio)) * count)


class MagnitudeHistogram:
    """Exact magnitude thresholds of all counted tensors together, for several ratios at once.

    Call `count` on every tensor; where `needs_refinement`, then `refine` on every tensor; then `thresholds`.
    """

    def __init__(self, dtype: torch.dtype, ratios: Iterable[float]) -> None:
        if dtype not in FLOAT_BITS:
            raise ValueError(f"expected weights in bfloat16, float16 or float32, found {dtype}")
        self.dtype, self.ratios = dtype, list(ratios)
        self.needs_refinement = dtype == torch.float32
        self._high_counts = np.zeros(BUCKETS, dtype=np.int64)
        self._low_counts: dict[int, np.ndarray] = {}  # by bucket

    def count(self, weight: torch.Tensor) -> np.ndarray:
        """Count the 15 high magnitude bits (first pass). Returns the histogram of `weight` alone, [BUCKETS]."""
        if not weight.numel():
            raise ValueError("an empty tensor has no magnitude threshold")
        counts = torch.zeros(BUCKETS, dtype=torch.int64)
        for bits in self._magnitude_bits(weight):
            counts += torch.bincount(bits >> LOW_BITS if self.needs_refinement else bits, minlength=BUCKETS)
        self._high_counts += counts.numpy()
        return counts.numpy()

    def refine(self, weight: torch.Tensor) -> None:
        """Count the low bits of float32 magnitudes in the buckets that hold a threshold (second pass)."""
        if not self._low_counts:
            buckets = {bucket for bucket, _ in self._locate_ranks() if bucket is not None}
            self._low_counts = {bucket: np.zeros(1 << LOW_BITS, dtype=np.int64) for bucket in buckets}
        for bits in self._magnitude_bits(weight):
            high = bits >> LOW_BITS
            for bucket, counts in self._low_counts.items():
                counts += torch.bincount(bits[high == bucket] & 0xFFFF, minlength=1 << LOW_BITS).numpy()

    def thresholds(self) -> list[float]:
        """Return one threshold per ratio. Raises ValueError if nothing was counted."""
        if not self._high_counts.any():
            raise ValueError("no weights to take a threshold of")
        located = zip(self.ratios, self._locate_ranks(), strict=True)
        return [self._threshold(ratio, bucket, rank) for ratio, (bucket, rank) in located]

    def _magnitude_bits(self, weight: torch.Tensor) -> Iterator[torch.Tensor]:
        if weight.dtype != self.dtype:
            raise ValueError(f"expected {self.dtype} like the tensors before, found {weight.dtype}")
        return _magnitude_bits(weight)

    def _locate_ranks(self) -> list[tuple[int | None, int]]:
        """Return, per ratio, the bucket that holds its rank, None at r = 1, and the rank within that bucket."""
        cumulative, total = np.cumsum(self._high_counts), int(self._high_counts.sum())
        located: list[tuple[int | None, int]] = []
        for rank in (order_index(ratio, total) for ratio in self.ratios):
            bucket = int(np.searchsorted(cumulative, rank, side="right"))
            below = int(cumulative[bucket - 1]) if bucket else 0
            located.append((bucket if bucket < BUCKETS else None, rank - below))
        return located

    def _threshold(self, ratio: float, bucket: int | None, rank: int) -> float:
        if ratio == 0:
            return 0.0
        if bucket is None:
            return math.inf
        bits = bucket
        if self.needs_refinement:
            cumulative = np.cumsum(self._low_counts[bucket])
            bits = bucket << LOW_BITS | int(np.searchsorted(cumulative, rank, side="right"))
        return torch.tensor(bits, dtype=FLOAT_BITS[self.dtype].integer).view(self.dtype).item()


def magnitude_thresholds(weight: torch.Tensor, ratios: Iterable[float]) -> list[float]:
    """Return the exact threshold lambda_r of each ratio (Eq. 1-2), which the module's docstring defines.

    `weight`: bfloat16, float16, float32 or float64, any shape. Raises ValueError on NaN, an empty tensor, another
    type, or a ratio outside [0, 1].
    """
    if weight.dtype == torch.float64:
        return _sorted_thresholds(weight, list(ratios))
    histogram = MagnitudeHistogram(weight.dtype, ratios)
    histogram.count(weight)
    if histogram.needs_refinement:
        histogram.refine(weight)
    return histogram.thresholds()


def _sorted_thresholds(weight: torch.Tensor, ratios: list[float]) -> list[float]:
    """Return `magnitude_thresholds` by sorting, for float64, which no checkpoint of the supported families uses."""
    if not weight.numel() or weight.isnan().any():
        raise ValueError("weights are empty or hold NaN: a magnitude threshold is not defined")
    magnitude = weight.detach().abs().flatten().sort().values
    ranks = [order_index(ratio, len(magnitude)) for ratio in ratios]
    return [
        0.0 if ratio == 0 else math.inf if rank == len(magnitude) else magnitude[rank].item()
        for ratio, rank in zip(ratios, ranks, strict=True)
    ]


def apply_mask(weight: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return a copy of `weight` (any shape) with zeros where |w| < lambda_r, the threshold (Eq. 1-2)."""
    masked = torch.empty_like(weight, memory_format=torch.contiguous_format)
    copy_masked(masked, weight, threshold)
    return masked


@torch.no_grad()
def copy_masked(destination: torch.Tensor, weight: torch.Tensor, threshold: float) -> None:
    """Copy `weight` into a contiguous tensor of its shape (any type and device), zeros where |w| < lambda_r (Eq. 1-2).

    Copies in chunks, so that no further tensor of that size is made. The mask is taken before any change of type.
    """
    chunks = zip(destination.view(-1).split(CHUNK), weight.contiguous().view(-1).split(CHUNK), strict=True)
    for target, source in chunks:
        target.copy_(torch.where(_is_kept(source, threshold), source, torch.zeros((), dtype=source.dtype)))


def _is_kept(weight: torch.Tensor, threshold: float) -> torch.Tensor:
    return weight.abs() >= threshold


def is_masked(name: str, dimensions: int, exclude: tuple[str, ...] = ()) -> bool:
    """Return whether a tensor is the weight of a linear or convolution module other than embeddings and lm_head.

    Ours: the paper does not say which tensors are masked.
    """
    eligible = name.endswith(".weight") and dimensions >= 2 and not NEVER_MASKED.search(name)
    return eligible and not any(safe_regex.matches(pattern, name) for pattern in exclude)


def mask_group(name: str, granularity: str) -> str:
    """Return the name of the group of tensors that share a threshold.

    The group is the matrix itself, its transformer block (outside of blocks its module), or the whole network.
    """
    if granularity == "global":
        return "all"
    if granularity == "matrix":
        return name
    block = BLOCK_NAME.match(name)
    return block.group(1) if block else ".".join(name.split(".")[:-2]) or name


def group_thresholds(
    read_tensors: Callable[[], NamedTensors], ratios: list[float], granularity: str, exclude: tuple[str, ...] = ()
) -> list[dict]:
    """Return the rows of the table thresholds: the group's threshold and the zeros of each masked tensor and ratio.

    `read_tensors` yields (name, tensor), one in memory at a time; it is called once where each matrix is a group, else
    once per pass. A zero is an element that is 0 once masked, whether or not it was 0 before. Raises ValueError, with
    the tensor's name, as `magnitude_thresholds` does (float64 is refused), and where tensors of a group differ in type.
    """

    def read_masked() -> GroupedTensors:
        for name, tensor in read_tensors():
            if is_masked(name, tensor.ndim, exclude):
                yield name, mask_group(name, granularity), tensor

    if granularity == "matrix":
        return [row for name, _, tensor in read_masked() for row in _matrix_rows(name, tensor, ratios)]
    return _shared_rows(read_masked, ratios)


def _matrix_rows(name: str, tensor: torch.Tensor, ratios: list[float]) -> list[dict]:
    """Return rows of a tensor that is its own group."""
    with _name_in_errors(name):
        histogram = MagnitudeHistogram(tensor.dtype, ratios)
        counts = histogram.count(tensor)
    if histogram.needs_refinement:
        histogram.refine(tensor)
    thresholds = histogram.thresholds()
    if histogram.needs_refinement:
        zeros = _count_zeros(tensor, thresholds)
    else:
        zeros = _count_zeros_in_histogram(counts, thresholds, tensor.dtype)
    return _rows(name, name, tensor.numel(), ratios, thresholds, zeros)


def _shared_rows(read_masked: Callable[[], GroupedTensors], ratios: list[float]) -> list[dict]:
    """Return rows of groups of several tensors. Reads the tensors to count, to refine if needed, and to count zeros."""
    histograms: dict[str, MagnitudeHistogram] = {}
    for name, group, tensor in read_masked():
        with _name_in_errors(name):
            if group not in histograms:
                histograms[group] = MagnitudeHistogram(tensor.dtype, ratios)
            histograms[group].count(tensor)
    if any(histogram.needs_refinement for histogram in histograms.values()):
        for _, group, tensor in read_masked():
            if histograms[group].needs_refinement:
                histograms[group].refine(tensor)
    thresholds = {group: histogram.thresholds() for group, histogram in histograms.items()}
    return [
        row
        for name, group, tensor in read_masked()
        for row in _rows(
            name, group, tensor.numel(), ratios, thresholds[group], _count_zeros(tensor, thresholds[group])
        )
    ]


def iterate_tensors(folder: Path, names: Container[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of a folder's safetensors files, one at a time in a fixed order; only `names` if given."""
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            stored = sorted(opened.keys())
        for name in stored:
            if names is not None and name not in names:
                continue
            # opened for each tensor: a mapping that stays would keep every page read so far
            with safe_open(file, "pt") as opened:
                yield name, opened.get_tensor(name)


@contextmanager
def _name_in_errors(name: str) -> Iterator[None]:
    """Put a tensor's name before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _zero_limits(thresholds: list[float], dtype: torch.dtype) -> list[int]:
    """Return the magnitude bits below which an element is 0 once masked; at least 1, as zeros always count."""
    return torch.tensor(thresholds, dtype=dtype).view(FLOAT_BITS[dtype].integer).clamp(min=1).tolist()


def _count_zeros(weight: torch.Tensor, thresholds: list[float]) -> list[int]:
    """Return, per threshold, the number of elements that are 0 once masked."""
    limits = _zero_limits(thresholds, weight.dtype)
    zeros = [0] * len(limits)
    for bits in _magnitude_bits(weight):
        for n, limit in enumerate(limits):
            zeros[n] += int(torch.count_nonzero(bits < limit))
    return zeros


def _count_zeros_in_histogram(counts: np.ndarray, thresholds: list[float], dtype: torch.dtype) -> list[int]:
    """Return `_count_zeros` of a 16-bit tensor, from the histogram of its magnitudes."""
    cumulative = np.cumsum(counts)
    return [int(cumulative[limit - 1]) for limit in _zero_limits(thresholds, dtype)]


def _magnitude_bits(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield magnitudes as integers of the same order, in chunks. Raises ValueError for NaN."""
    layout = FLOAT_BITS[weight.dtype]
    for chunk in weight.detach().cpu().contiguous().view(-1).view(layout.integer).split(CHUNK):
        bits = chunk & layout.magnitude
        if bits.max() > layout.infinity:
            raise ValueError("weights hold NaN: a magnitude threshold is not defined")
        yield bits


def _rows(
    name: str, group: str, numel: int, ratios: list[float], thresholds: list[float], zeros: list[int]
) -> list[dict]:
    return [
        dict(tensor=name, mask_group=group, mask_ratio=r, threshold=t, numel=numel, zeros=z, sparsity=z / numel)
        for r, t, z in zip(ratios, thresholds, zeros, strict=True)
    ]
