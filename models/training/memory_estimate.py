"""What a training process will need in memory, estimated from files' headers and planned lengths before it starts."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import safe_open

from masters.common import machine
from masters.common.errors import InputError
from masters.config import Runtime, Train
from masters.models.distributed.mixed_precision import frozen_dtype
from masters.models.losses.chunked_head import chunk_bytes
from masters.models.masking import BLOCK, mask_group

# kept for the backward pass, against a value for every input and output of every linear module: of five models, all
# families, between 1.12 and 1.43 were counted
KEPT = 1.25
PATCHES = 4  # image patches in the vision tower for each image token of the language model, in all families
CHUNKS = 5  # buffers of the vocabulary's pass that are held at a time
COPIES = 2  # of weights and optimizer states, in memory while a checkpoint is written
VISION = ("visual", "vision", "projector", "aligner")
GIB = 2**30
REPLICATED = Runtime()
Shapes = dict[str, list[int]]


@dataclass(frozen=True)
class Footprint:
    """Bytes, as they add up while a step runs; `saving`, `loading`: how much more these take than a step."""

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int
    exchange: int  # of gradients and of what is gathered, between ranks
    saving: int
    loading: int = 0
    reference: int = 0  # pi_ref, where it is held

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def on(self, device: str) -> "Footprint":
        """What of it is taken on a device: checkpoints and models that are being read lie in the CPU's memory."""
        return self if device == "cpu" else replace(self, saving=0, loading=0)

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
    runtime: Runtime = REPLICATED,
) -> Footprint:
    """Of one rank. `tokens`: of its largest forward pass, padding included, and how many of them are an image's;
    `saves`: into memory of this kind, that is, on a CPU.

    With products in bfloat16 a pass also keeps a copy of the weights in it (of shares it has none: FSDP2 gathers them
    in it), and at most as much as in float32 else.
    """
    own, taught = shapes(student), shapes(teacher) if teacher else {}
    width, product = getattr(torch, train.dtype).itemsize, getattr(torch, frozen_dtype(train)).itemsize
    weights, teachers = width * _numbers(own.values()), product * _numbers(taught.values())
    reference = product * _numbers(own.values()) if train.holds_reference else 0
    activations = _activations(own, width, tokens, device, runtime.activation_checkpointing)
    if runtime.sharding == "replicate":
        activations += product * _numbers(own.values()) if tokens[0] and product != width else 0
        exchange = weights if ranks > 1 else 0
        saving = max(0, COPIES * 3 * weights - weights - activations) if saves else 0
        return Footprint(weights, weights, 2 * weights, teachers, activations, exchange, saving, reference=reference)
    share, shared_teacher, shared_reference = weights // ranks, teachers // ranks, reference // ranks
    exchange = (width + product) * _gathered(own) + product * _gathered(taught)
    exchange += product * _gathered(own) if reference else 0
    step = 4 * share + shared_teacher + shared_reference + activations + exchange
    # one rank alone writes all of it: its part of what the ranks need together
    saving = COPIES * 3 * weights // ranks - share - activations - exchange if saves else 0
    # every rank reads a model as a whole before it keeps its share, one model after the other
    loading = max(weights, share + teachers, share + shared_teacher + reference) - step
    parts = share, share, 2 * share, shared_teacher, activations, exchange
    loading = max(0, loading - max(0, saving))
    return Footprint(*parts, saving=max(0, saving), loading=loading, reference=shared_reference)


def _activations(own: Shapes, width: int, tokens: tuple[int, int], device: str, computed_again: bool) -> int:
    """Bytes that the student's forward pass keeps for its backward pass, its pass over the vocabulary included."""
    text_tokens, image_tokens = tokens
    vocabulary = max((shape for name, shape in own.items() if "embed_tokens" in name), default=[0, 0])
    head = CHUNKS * min(chunk_bytes(device), 4 * text_tokens * vocabulary[0]) + 4 * math.prod(vocabulary)
    kept: dict[str, int] = {}  # by transformer block
    inputs: dict[str, int] = {}
    for name, shape in own.items():
        if len(shape) == 2 and "embed" not in name and "lm_head" not in name:
            seen = PATCHES * image_tokens if any(part in name for part in VISION) else text_tokens
            block = mask_group(name, "block")
            kept[block] = kept.get(block, 0) + sum(shape) * seen
            inputs[block] = min(inputs.get(block, shape[1] * seen), shape[1] * seen)
    numbers = sum(kept.values())
    if computed_again:
        numbers = sum(inputs.values()) + max(kept.values(), default=0)
    return int(KEPT * width * numbers) + (head if text_tokens else 0)


def _gathered(own: Shapes) -> int:
    """Numbers of what is whole at a time where weights are sharded: what is in no block, and two blocks."""
    blocks: dict[str, int] = {}
    for name, shape in own.items():
        found = BLOCK.match(name)
        blocks[found[1] if found else ""] = blocks.get(found[1] if found else "", 0) + math.prod(shape)
    rest = blocks.pop("", 0)
    return rest + sum(sorted(blocks.values())[-2:])


def free(device: str, ranks: int) -> tuple[int, int]:
    """Bytes that are free on a device now, and how many of the ranks share them."""
    if device == "cpu":
        return machine.available(), ranks
    return torch.cuda.mem_get_info(device)[0], math.ceil(ranks / torch.cuda.device_count())


def check(needed: Footprint, available: int, ranks: int, device: str, tokens: int) -> None:
    """Raises InputError where a device does not have the memory that its ranks need together."""
    total = ranks * needed.total
    if total <= available:
        return
    by_budget = ranks * (needed.total - needed.activations) <= available and needed.saving + needed.loading == 0
    lower = "runtime.token_budget" if by_budget else "runtime.train_processes" if ranks > 1 else ""
    advice = f"lower {lower}" if lower else 'take a smaller model, train.dtype = "bfloat16", or a larger machine'
    raise InputError(
        f"training needs about {total / GIB:.2f} GiB on {device}, {available / GIB:.2f} GiB are free "
        f"({'' if ranks == 1 else f'{ranks} processes, each '}{needed} GiB; largest pass: {tokens} tokens): {advice}"
    )


def shapes(folder: Path) -> Shapes:
    """Shapes of a checkpoint's tensors, from its headers alone."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()  # it is no dict: nothing can be iterated over but this
            found |= {name: tensors.get_slice(name).get_shape() for name in names}
    return found


def _numbers(found: Iterable[list[int]]) -> int:
    return sum(map(math.prod, found))
