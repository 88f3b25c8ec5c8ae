"""Masked teachers (Eq. 1-2): a weight is kept where |w| >= lambda_r, else zero for a while. Nothing is pruned for good.

Ours, exactly: lambda_r is the magnitude at 0-based rank floor(r N) in ascending order; ties at the threshold are kept,
so the realized sparsity can fall short of r. r = 0 gives 0, r = 1 gives infinity. The paper takes thresholds per layer,
as one for the whole network prunes some layers until the model stops working; ours are per weight matrix by default.

Exact order statistics come from counting magnitudes: floats of one sign order like their bit patterns, so a
histogram over the high bits (all 15 of a 16-bit float) finds a rank's bucket; 32-bit floats take a second pass
over the low bits of that bucket. With a threshold a matrix these passes run over one tensor while it is held: a
checkpoint is read once. With a threshold a block or network it is read again for each.
"""

import math
import re
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from masters.common import safe_regex

PIECE = 1 << 20  # elements counted at a time
BUCKETS = 1 << 15  # of a magnitude's 15 high bits
LOW_BITS = 16  # what a float32 has below them
# the integer type of a float's bits, its magnitude's bits, and the pattern of infinity (NaN lies above)
PATTERNS = {
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
    torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000),
}
NEVER = re.compile(r"lm_head|embed_tokens|pos_embed|position_embedding|cls_token|class_embedding|norm|(^|\.)ln_")
BLOCK = re.compile(r"^((?:.*?\.)?(?:layers|layer|blocks|block|h)\.\d+)\.")

Tensors = Callable[[], Iterable[tuple[str, torch.Tensor]]]


def order_index(ratio: float, count: int) -> int:
    """floor(r N) of Eq. 1-2, ours exactly for decimal ratios (0.29 * 100 is 29, whatever floats say)."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"a mask ratio lies in [0, 1], found {ratio}")
    return math.floor(Fraction(str(ratio)) * count)


class MagnitudeRanks:
    """Exact order statistics of the magnitudes of all tensors counted, for several ratios at once.

    Use: `count` every tensor; for float32 then `refine` every tensor; then `thresholds`.
    """

    def __init__(self, dtype: torch.dtype, ratios: Iterable[float]) -> None:
        if dtype not in PATTERNS:
            raise ValueError(f"expected weights in bfloat16, float16 or float32, found {dtype}")
        self.dtype, self.ratios = dtype, list(ratios)
        self._high = np.zeros(BUCKETS, dtype=np.int64)
        self._low: dict[int, np.ndarray] = {}

    def count(self, weight: torch.Tensor) -> np.ndarray:
        """First pass: the magnitudes' 15 high bits. Returns the histogram of `weight` alone."""
        if not weight.numel():
            raise ValueError("an empty tensor has no magnitude threshold")
        own = torch.zeros(BUCKETS, dtype=torch.int64)
        for pattern in self._patterns(weight):
            own += torch.bincount(pattern >> self._shift if self._shift else pattern, minlength=BUCKETS)
        self._high += own.numpy()
        return own.numpy()

    def refine(self, weight: torch.Tensor) -> None:
        """Second pass of float32: the low bits of magnitudes in the buckets that hold a threshold."""
        if not self._low:
            held = {bucket for bucket, _ in self._places() if bucket is not None}
            self._low = {bucket: np.zeros(1 << LOW_BITS, dtype=np.int64) for bucket in held}
        for pattern in self._patterns(weight):
            high = pattern >> LOW_BITS
            for bucket, counts in self._low.items():
                counts += torch.bincount(pattern[high == bucket] & 0xFFFF, minlength=1 << LOW_BITS).numpy()

    def thresholds(self) -> list[float]:
        """One a ratio. Raises ValueError if nothing was counted."""
        if not self._high.any():
            raise ValueError("no weights to take a threshold of")
        return [self._value(ratio, *place) for ratio, place in zip(self.ratios, self._places(), strict=True)]

    @property
    def refines(self) -> bool:
        """Whether magnitudes have bits that the first pass does not see."""
        return self.dtype == torch.float32

    @property
    def _shift(self) -> int:
        return LOW_BITS if self.refines else 0

    def _patterns(self, weight: torch.Tensor) -> Iterator[torch.Tensor]:
        if weight.dtype != self.dtype:
            raise ValueError(f"expected {self.dtype} like the tensors before, found {weight.dtype}")
        return _patterns(weight)

    def _places(self) -> list[tuple[int | None, int]]:
        """Per ratio the bucket of its rank and the rank within it; no bucket at r = 0 and r = 1."""
        below, total = np.cumsum(self._high), int(self._high.sum())
        places: list[tuple[int | None, int]] = []
        for wanted in (order_index(ratio, total) for ratio in self.ratios):
            bucket = int(np.searchsorted(below, wanted, side="right"))
            inside = wanted - int(below[bucket - 1]) if bucket else wanted
            places.append((bucket if bucket < BUCKETS else None, inside))
        return places

    def _value(self, ratio: float, bucket: int | None, inside: int) -> float:
        if ratio == 0:
            return 0.0
        if bucket is None:
            return math.inf
        pattern = bucket
        if self._shift:
            pattern = bucket << LOW_BITS | int(np.searchsorted(np.cumsum(self._low[bucket]), inside, side="right"))
        integer, _, _ = PATTERNS[self.dtype]
        return torch.tensor(pattern, dtype=integer).view(self.dtype).item()


def magnitude_thresholds(weight: torch.Tensor, ratios: Iterable[float]) -> list[float]:
    """lambda_r, one threshold a ratio, exact (Eq. 1-2); see the module's head for the definition.

    `weight`: bfloat16, float16, float32 or float64, any shape. Raises ValueError on NaN, an empty tensor, another
    type, or a ratio outside [0, 1].
    """
    if weight.dtype == torch.float64:
        return _sorted_thresholds(weight, list(ratios))
    ranks = MagnitudeRanks(weight.dtype, ratios)
    ranks.count(weight)
    if ranks.refines:
        ranks.refine(weight)
    return ranks.thresholds()


def _sorted_thresholds(weight: torch.Tensor, ratios: list[float]) -> list[float]:
    """The definition itself, by sorting: for float64, which no checkpoint of the families has."""
    if not weight.numel() or weight.isnan().any():
        raise ValueError("weights are empty or hold NaN: a magnitude threshold is not defined")
    magnitude = weight.detach().abs().flatten().sort().values
    ranks = [order_index(ratio, len(magnitude)) for ratio in ratios]
    return [
        0.0 if ratio == 0 else math.inf if at == len(magnitude) else magnitude[at].item()
        for ratio, at in zip(ratios, ranks, strict=True)
    ]


def apply_mask(weight: torch.Tensor, threshold: float) -> torch.Tensor:
    """A copy of `weight` (any shape) with zeros where |w| < lambda_r, the threshold (Eq. 1-2)."""
    masked = torch.empty_like(weight, memory_format=torch.contiguous_format)
    copy_masked(masked, weight, threshold)
    return masked


@torch.no_grad()
def copy_masked(into: torch.Tensor, weight: torch.Tensor, threshold: float) -> None:
    """Copy `weight` into a contiguous tensor of its shape (any type and device), zeros where |w| < lambda_r (Eq. 1-2).

    In slices: no further tensor of that size is made. The mask is taken before any change of type.
    """
    for part, at in zip(weight.contiguous().view(-1).split(PIECE), into.view(-1).split(PIECE), strict=True):
        at.copy_(torch.where(_kept(part, threshold), part, torch.zeros((), dtype=part.dtype)))


def _kept(weight: torch.Tensor, threshold: float) -> torch.Tensor:
    return weight.abs() >= threshold


def is_masked(name: str, dimensions: int, exclude: tuple[str, ...] = ()) -> bool:
    """Whether a checkpoint's tensor is the weight of a linear or convolution module outside embeddings and lm_head.

    Ours: the paper does not say which tensors are masked.
    """
    eligible = name.endswith(".weight") and dimensions >= 2 and not NEVER.search(name)
    return eligible and not any(safe_regex.found(pattern, name) for pattern in exclude)


def mask_group(name: str, granularity: str) -> str:
    """What shares a threshold: the matrix itself, its transformer block (else its module), or the whole network."""
    if granularity == "global":
        return "all"
    if granularity == "matrix":
        return name
    block = BLOCK.match(name)
    return block.group(1) if block else ".".join(name.split(".")[:-2]) or name


def group_thresholds(
    tensors: Tensors, ratios: list[float], granularity: str, exclude: tuple[str, ...] = ()
) -> list[dict]:
    """Rows of the thresholds table: per masked tensor and ratio its group's threshold and its realized zeros.

    `tensors` yields (name, tensor), one of which is held at a time; it is called once where a matrix is a group, else
    once a pass. A zero is an element that is 0 once masked, whether or not it was 0 before. Raises ValueError, with the
    tensor's name, as `magnitude_thresholds` does (float64 is refused), and where a group's tensors differ in type.
    """

    def masked() -> Iterator[tuple[str, str, torch.Tensor]]:
        for name, tensor in tensors():
            if is_masked(name, tensor.ndim, exclude):
                yield name, mask_group(name, granularity), tensor

    if granularity == "matrix":
        return [row for name, _, tensor in masked() for row in _matrix_rows(name, tensor, ratios)]
    return _shared_rows(masked, ratios)


def _matrix_rows(name: str, tensor: torch.Tensor, ratios: list[float]) -> list[dict]:
    """Rows of a tensor that is a group by itself."""
    with _named(name):
        ranks = MagnitudeRanks(tensor.dtype, ratios)
        histogram = ranks.count(tensor)
    if ranks.refines:
        ranks.refine(tensor)
    found = ranks.thresholds()
    zeros = _zeros(tensor, found) if ranks.refines else _histogram_zeros(histogram, found, tensor.dtype)
    return _rows(name, name, tensor.numel(), ratios, found, zeros)


def _shared_rows(masked: Callable[[], Iterator[tuple[str, str, torch.Tensor]]], ratios: list[float]) -> list[dict]:
    """Rows of (name, group, tensor) where groups have several tensors: a pass to count, to refine, for the zeros."""
    groups: dict[str, MagnitudeRanks] = {}
    for name, group, tensor in masked():
        with _named(name):
            if group not in groups:
                groups[group] = MagnitudeRanks(tensor.dtype, ratios)
            groups[group].count(tensor)
    for _, group, tensor in masked() if any(ranks.refines for ranks in groups.values()) else ():
        if groups[group].refines:
            groups[group].refine(tensor)
    found = {group: ranks.thresholds() for group, ranks in groups.items()}
    return [
        row
        for name, group, tensor in masked()
        for row in _rows(name, group, tensor.numel(), ratios, found[group], _zeros(tensor, found[group]))
    ]


def safetensors_tensors(folder: Path, wanted: Container[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every safetensors file of a folder (or of those `wanted`), one at a time, in a fixed order."""
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names = sorted(opened.keys())
        for name in names:
            if wanted is not None and name not in wanted:
                continue
            # opened for each: a mapping that stays would keep every page read so far
            with safe_open(file, "pt") as opened:
                yield name, opened.get_tensor(name)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """A ValueError within says which tensor it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _limits(thresholds: list[float], dtype: torch.dtype) -> list[int]:
    """Patterns of magnitude below which an element is 0 once masked; below 1 it is 0 anyway."""
    return torch.tensor(thresholds, dtype=dtype).view(PATTERNS[dtype][0]).clamp(min=1).tolist()


def _zeros(weight: torch.Tensor, thresholds: list[float]) -> list[int]:
    """Per threshold, how many elements of a tensor lie below it or are 0 anyway; counted in slices."""
    limits = _limits(thresholds, weight.dtype)
    zeros = [0] * len(limits)
    for pattern in _patterns(weight):
        for n, limit in enumerate(limits):
            zeros[n] += int(torch.count_nonzero(pattern < limit))
    return zeros


def _histogram_zeros(histogram: np.ndarray, thresholds: list[float], dtype: torch.dtype) -> list[int]:
    """`_zeros` of a 16-bit tensor, from the histogram of its magnitudes."""
    below = np.cumsum(histogram)
    return [int(below[limit - 1]) for limit in _limits(thresholds, dtype)]


def _patterns(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Magnitudes as integers of the same order, a slice at a time. Raises ValueError for NaN."""
    integer, magnitude, infinity = PATTERNS[weight.dtype]
    for bits in weight.detach().cpu().contiguous().view(-1).view(integer).split(PIECE):
        pattern = bits & magnitude
        if pattern.max() > infinity:
            raise ValueError("weights hold NaN: a magnitude threshold is not defined")
        yield pattern


def _rows(
    name: str, group: str, numel: int, ratios: list[float], thresholds: list[float], zeros: list[int]
) -> list[dict]:
    return [
        dict(tensor=name, mask_group=group, mask_ratio=r, threshold=t, numel=numel, zeros=z, sparsity=z / numel)
        for r, t, z in zip(ratios, thresholds, zeros, strict=True)
    ]
