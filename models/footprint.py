"""What a training process will need in memory, estimated from files' headers and planned lengths before it starts."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open

from masters import memory
from masters.config import Train
from masters.errors import InputError
from masters.models.head import chunk_bytes
from masters.models.precision import teacher_dtype

# kept for the backward pass, against a value for every input and output of every linear module: of five models, all
# families, between 1.12 and 1.43 were counted
KEPT = 1.25
PATCHES = 4  # image patches in the vision tower for each image token of the language model, in all families
CHUNKS = 5  # buffers of the vocabulary's pass that are held at a time
COPIES = 2  # of weights and optimiser states, in memory while a checkpoint is written
VISION = ("visual", "vision", "projector", "aligner")
GIB = 2**30


@dataclass(frozen=True)
class Footprint:
    """Bytes, as they add up while a step runs; `saving`: how much more a checkpoint takes than a step."""

    weights: int
    gradients: int
    optimiser: int
    teacher: int
    activations: int
    exchange: int  # of gradients, between ranks
    saving: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = {field.name: getattr(self, field.name) / GIB for field in fields(self)}
        return ", ".join(f"{name} {size:.2f}" for name, size in parts.items() if size)


def footprint(
    student: Path,
    teacher: Path | None,
    train: Train,
    tokens: tuple[int, int],
    ranks: int,
    saves: bool,
    device: str = "cpu",
) -> Footprint:
    """Of one rank. `tokens`: of its largest forward pass, padding included, and how many of them are an image's;
    `saves`: into memory of this kind, that is, on a CPU.

    With products in bfloat16 a pass also keeps a copy of the weights in it, and at most as much as in float32 else.
    """
    text_tokens, image_tokens = tokens
    width = getattr(torch, train.dtype).itemsize
    own = shapes(student)
    weights = width * _numbers(own.values())
    vocabulary = max((shape for name, shape in own.items() if "embed_tokens" in name), default=[0, 0])
    head = CHUNKS * min(chunk_bytes(device), 4 * text_tokens * vocabulary[0]) + 4 * math.prod(vocabulary)
    kept = sum(
        sum(shape) * (PATCHES * image_tokens if any(part in name for part in VISION) else text_tokens)
        for name, shape in own.items()
        if len(shape) == 2 and "embed" not in name and "lm_head" not in name
    )
    copies = 0 if train.compute_dtype == "float32" else getattr(torch, train.compute_dtype).itemsize * weights // width
    activations = int(KEPT * width * kept) + ((head + copies) if text_tokens else 0)
    return Footprint(
        weights=weights,
        gradients=weights,
        optimiser=2 * weights,
        teacher=getattr(torch, teacher_dtype(train)).itemsize * _numbers(shapes(teacher).values()) if teacher else 0,
        activations=activations,
        exchange=weights if ranks > 1 else 0,
        saving=max(0, COPIES * 3 * weights - weights - activations) if saves else 0,
    )


def free(device: str, ranks: int) -> tuple[int, int]:
    """Bytes that are free on a device now, and how many of the ranks share them."""
    if device == "cpu":
        return memory.available(), ranks
    return torch.cuda.mem_get_info(device)[0], math.ceil(ranks / torch.cuda.device_count())


def check(needed: Footprint, available: int, ranks: int, device: str, tokens: int) -> None:
    """Raises InputError where a device does not have the memory that its ranks need together."""
    total = ranks * needed.total
    if total <= available:
        return
    by_budget = ranks * (needed.total - needed.activations) <= available and needed.saving == 0
    lower = "runtime.token_budget" if by_budget else "runtime.train_processes" if ranks > 1 else ""
    advice = f"lower {lower}" if lower else 'take a smaller model, train.dtype = "bfloat16", or a larger machine'
    raise InputError(
        f"training needs about {total / GIB:.2f} GiB on {device}, {available / GIB:.2f} GiB are free "
        f"({'' if ranks == 1 else f'{ranks} processes, each '}{needed} GiB; largest pass: {tokens} tokens): {advice}"
    )


def shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of a checkpoint's tensors, from its headers alone."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()  # it is no dict: nothing can be iterated over but this
            found |= {name: tensors.get_slice(name).get_shape() for name in names}
    return found


def _numbers(found: Iterable[list[int]]) -> int:
    return sum(map(math.prod, found))
