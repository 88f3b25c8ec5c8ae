"""Masked teachers (Eq. 1-2): a weight is kept where |w| >= lambda_r, else zero for a while. Nothing is pruned for good.

Ours, exactly: lambda_r is the magnitude at 0-based rank floor(r N) in ascending order; ties at the threshold are kept,
so the realised sparsity can fall short of r. r = 0 gives 0, r = 1 gives infinity. The paper takes thresholds per layer,
as one for the whole network prunes some layers until the model stops working; ours are per weight matrix by default.

Exact order statistics come from counting magnitudes: floats of one sign order like their bit patterns, so a
histogram over the high bits (all 15 of a 16-bit float) finds a rank's bucket; 32-bit floats take a second pass
over the low bits of that bucket. The zeros that a threshold gives are read off the same histogram for 16-bit floats,
which are thus read once; 32-bit floats are read a third time to count them.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from masters import patterns

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
Histogram = tuple[np.ndarray, np.ndarray]  # patterns that occur, cumulative counts


def rank(ratio: float, count: int) -> int:
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
    def _shift(self) -> int:
        return LOW_BITS if self.dtype == torch.float32 else 0

    def _patterns(self, weight: torch.Tensor) -> Iterator[torch.Tensor]:
        if weight.dtype != self.dtype:
            raise ValueError(f"expected {self.dtype} like the tensors before, found {weight.dtype}")
        integer, magnitude, infinity = PATTERNS[self.dtype]
        for bits in weight.detach().cpu().contiguous().view(-1).view(integer).split(PIECE):
            pattern = bits & magnitude
            if pattern.max() > infinity:
                raise ValueError("weights hold NaN: a magnitude threshold is not defined")
            yield pattern

    def _places(self) -> list[tuple[int | None, int]]:
        """Per ratio the bucket of its rank and the rank within it; no bucket at r = 0 and r = 1."""
        below, total = np.cumsum(self._high), int(self._high.sum())
        places: list[tuple[int | None, int]] = []
        for wanted in (rank(ratio, total) for ratio in self.ratios):
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
    if weight.dtype == torch.float32:
        ranks.refine(weight)
    return ranks.thresholds()


def _sorted_thresholds(weight: torch.Tensor, ratios: list[float]) -> list[float]:
    """The definition itself, by sorting: for float64, which no checkpoint of the families has."""
    if not weight.numel() or weight.isnan().any():
        raise ValueError("weights are empty or hold NaN: a magnitude threshold is not defined")
    magnitude = weight.detach().abs().flatten().sort().values
    ranks = [rank(ratio, len(magnitude)) for ratio in ratios]
    return [
        0.0 if ratio == 0 else math.inf if at == len(magnitude) else magnitude[at].item()
        for ratio, at in zip(ratios, ranks, strict=True)
    ]


def apply_mask(weight: torch.Tensor, threshold: float) -> torch.Tensor:
    """A copy of `weight` (any shape) with zeros where |w| < lambda_r, the threshold (Eq. 1-2)."""
    return torch.where(weight.abs() >= threshold, weight, torch.zeros((), dtype=weight.dtype))


def is_masked(name: str, dimensions: int, exclude: tuple[str, ...] = ()) -> bool:
    """Whether a checkpoint's tensor is the weight of a linear or convolution module outside embeddings and lm_head.

    Ours: the paper does not say which tensors are masked.
    """
    eligible = name.endswith(".weight") and dimensions >= 2 and not NEVER.search(name)
    return eligible and not any(patterns.found(pattern, name) for pattern in exclude)


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
    """Rows of the thresholds table: per masked tensor and ratio its group's threshold and its realised zeros.

    `tensors` is called once a pass and yields (name, tensor); one tensor is held at a time. A zero is an element
    that is 0 once masked, whether or not it was 0 before. Raises ValueError, with the tensor's name, as
    `magnitude_thresholds` does (float64 is refused), and where a group's tensors differ in type.
    """
    groups: dict[str, MagnitudeRanks] = {}
    counted: dict[str, tuple[str, Histogram]] = {}

    def masked(kinds: set[str] | None = None) -> Iterator[tuple[str, str, torch.Tensor]]:
        for name, tensor in tensors():
            if is_masked(name, tensor.ndim, exclude):
                group = mask_group(name, granularity)
                if kinds is None or group in kinds:
                    yield name, group, tensor

    for name, group, tensor in masked():
        try:
            if group not in groups:
                groups[group] = MagnitudeRanks(tensor.dtype, ratios)
            counted[name] = group, _cumulative(groups[group].count(tensor))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    wide = {group for group, ranks in groups.items() if ranks.dtype == torch.float32}
    for _, group, tensor in masked(wide) if wide else ():
        groups[group].refine(tensor)
    found = {group: ranks.thresholds() for group, ranks in groups.items()}
    zeros = {name: _zeros(of, found[g], groups[g].dtype) for name, (g, of) in counted.items() if g not in wide}
    for name, group, tensor in masked(wide) if wide else ():
        zeros[name] = [int(torch.count_nonzero(apply_mask(tensor, t) == 0)) for t in found[group]]
    return [row for name, (g, of) in counted.items() for row in _rows(name, g, of, ratios, found[g], zeros[name])]


def safetensors_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every safetensors file of a folder, one at a time, in a fixed order."""
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names = sorted(opened.keys())
        for name in names:
            # opened for each: a mapping that stays would keep every page read so far
            with safe_open(file, "pt") as opened:
                yield name, opened.get_tensor(name)


def _cumulative(histogram: np.ndarray) -> Histogram:
    """The patterns that occur, ascending, and how many elements have each or a lower one."""
    patterns = np.flatnonzero(histogram)
    return patterns, np.cumsum(histogram[patterns])


def _zeros(histogram: Histogram, thresholds: list[float], dtype: torch.dtype) -> list[int]:
    """Per threshold, how many elements of a 16-bit tensor lie below it or are 0 anyway."""
    patterns, cumulative = histogram
    limits = torch.tensor(thresholds, dtype=dtype).view(torch.int16).clamp(min=1).numpy()
    return [int(cumulative[at - 1]) if at else 0 for at in np.searchsorted(patterns, limits)]


def _rows(
    name: str, group: str, histogram: Histogram, ratios: list[float], thresholds: list[float], zeros: list[int]
) -> list[dict]:
    numel = int(histogram[1][-1])
    return [
        dict(tensor=name, mask_group=group, mask_ratio=r, threshold=t, numel=numel, zeros=z, sparsity=z / numel)
        for r, t, z in zip(ratios, thresholds, zeros, strict=True)
    ]
