"""Estimate of the memory that a training process needs, from file headers and planned lengths, before models load."""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from masters.common import machine
from masters.common.errors import InputError
from masters.config import Runtime, Train
from masters.models.distributed.mixed_precision import frozen_dtype
from masters.models.losses.chunked_head import chunk_bytes
from masters.models.masking import BLOCK_NAME, mask_group
from masters.models.model_loading import tensor_shapes

# activations kept for the backward pass, relative to the inputs and outputs of all linear modules: between 1.12 and
# 1.43 were measured on five models of all families
KEPT_ACTIVATIONS = 1.25
PATCHES = 4  # image patches in the vision tower for each image token of the language model, in all families
HEAD_BUFFERS = 5  # buffers that the chunked pass over the vocabulary holds at a time
CHECKPOINT_COPIES = 2  # copies of weights and optimizer states in memory while a checkpoint is written
VISION = ("visual", "vision", "projector", "aligner")
GIB = 2**30
REPLICATED = Runtime()
Shapes = dict[str, list[int]]


@dataclass(frozen=True)
class PassSize:
    """Tokens of a forward pass, padding included, and how many of them are image tokens."""

    tokens: int
    image_tokens: int


NO_PASS = PassSize(0, 0)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one rank needs during a step, by purpose, and what saving and loading need beyond that."""

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int
    exchange: int  # gradients and gathered weights on their way between ranks
    saving: int  # a checkpoint, beyond what a step needs
    loading: int = 0  # the models, beyond what a step and `saving` need
    reference: int = 0  # pi_ref

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def on(self, device: str) -> "MemoryEstimate":
        """Return the part that lies on a device: checkpoints and models that are being read lie in the CPU's memory."""
        return self if device == "cpu" else replace(self, saving=0, loading=0)

    def __str__(self) -> str:
        parts = {field.name: getattr(self, field.name) / GIB for field in fields(self)}
        return ", ".join(f"{name} {size:.2f}" for name, size in parts.items() if size)


@dataclass(frozen=True)
class _ModelBytes:
    """Bytes of whole models. `gathered`: weights that FSDP2 holds whole at a time during a pass of all models."""

    weights: int
    teacher: int
    reference: int
    compute_copy: int  # of the student's weights in the type of its products, 0 if that is the type of the weights
    gathered: int


def estimate_memory(
    student: Path,
    teacher: Path | None,
    train: Train,
    largest_pass: PassSize,
    ranks: int,
    saves: bool,
    device: str = "cpu",
    runtime: Runtime = REPLICATED,
) -> MemoryEstimate:
    """Estimate the memory of one rank. `saves`: whether checkpoints are written from the memory of this device.

    With products in bfloat16 a pass also keeps a copy of the student's weights in that type, if ranks hold them whole:
    FSDP2 gathers them in it. Other activations take at most as much as in float32.
    """
    student_shapes, teacher_shapes = tensor_shapes(student), tensor_shapes(teacher) if teacher else {}
    width, compute_width = (getattr(torch, dtype).itemsize for dtype in (train.dtype, frozen_dtype(train)))
    student_size, student_gathered = count_parameters(student_shapes), _count_gathered(student_shapes)
    reference_width = compute_width if train.holds_reference else 0
    models = _ModelBytes(
        weights=width * student_size,
        teacher=compute_width * count_parameters(teacher_shapes),
        reference=reference_width * student_size,
        compute_copy=compute_width * student_size if compute_width != width else 0,
        gathered=(width + compute_width + reference_width) * student_gathered
        + compute_width * _count_gathered(teacher_shapes),
    )
    activations = _activation_bytes(student_shapes, width, largest_pass, device, runtime.activation_checkpointing)
    if runtime.sharding == "replicate":
        return _replicated(models, activations + (models.compute_copy if largest_pass.tokens else 0), ranks, saves)
    return _sharded(models, activations, ranks, saves)


def _replicated(models: _ModelBytes, activations: int, ranks: int, saves: bool) -> MemoryEstimate:
    """Estimate the memory if every rank holds all weights, gradients and both optimizer states."""
    weights = models.weights
    saving = CHECKPOINT_COPIES * 3 * weights - weights - activations if saves else 0  # gradients are free by then
    return MemoryEstimate(
        weights=weights,
        gradients=weights,
        optimizer=2 * weights,
        teacher=models.teacher,
        activations=activations,
        exchange=weights if ranks > 1 else 0,
        saving=max(0, saving),
        reference=models.reference,
    )


def _sharded(models: _ModelBytes, activations: int, ranks: int, saves: bool) -> MemoryEstimate:
    """Estimate the memory if every rank holds an equal share of all models and gathers blocks to compute with them."""
    share, teacher, reference = models.weights // ranks, models.teacher // ranks, models.reference // ranks
    step = 4 * share + teacher + reference + activations + models.gathered
    # rank 0 alone writes whole tensors: this is one rank's part of what the ranks need together
    saving = CHECKPOINT_COPIES * 3 * models.weights // ranks - share - activations - models.gathered if saves else 0
    # every rank reads each model whole before it keeps its share: student, teacher, pi_ref
    loading = max(models.weights, share + models.teacher, share + teacher + models.reference) - step
    return MemoryEstimate(
        weights=share,
        gradients=share,
        optimizer=2 * share,
        teacher=teacher,
        activations=activations,
        exchange=models.gathered,
        saving=max(0, saving),
        loading=max(0, loading - max(0, saving)),
        reference=reference,
    )


def _activation_bytes(shapes: Shapes, width: int, largest_pass: PassSize, device: str, recomputes: bool) -> int:
    """Return the bytes that the student's forward pass keeps for its backward pass, with its pass over the vocabulary.

    `recomputes`: with activation checkpointing only each block's input is kept, and one block's activations at a time.
    """
    if not largest_pass.tokens:
        return 0
    kept: dict[str, int] = {}  # by transformer block
    inputs: dict[str, int] = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and "embed" not in name and "lm_head" not in name:
            is_vision = any(part in name for part in VISION)
            tokens = PATCHES * largest_pass.image_tokens if is_vision else largest_pass.tokens
            block, block_input = mask_group(name, "block"), shape[1] * tokens
            kept[block] = kept.get(block, 0) + sum(shape) * tokens
            inputs[block] = min(inputs.get(block, block_input), block_input)
    values = sum(inputs.values()) + max(kept.values(), default=0) if recomputes else sum(kept.values())
    return int(KEPT_ACTIVATIONS * width * values) + _head_bytes(shapes, largest_pass.tokens, device)


def _head_bytes(shapes: Shapes, tokens: int, device: str) -> int:
    """Return the bytes of the chunked pass over the vocabulary: its buffers, and the head's weights in float32."""
    embedding = max((shape for name, shape in shapes.items() if "embed_tokens" in name), default=[0, 0])
    return HEAD_BUFFERS * min(chunk_bytes(device), 4 * tokens * embedding[0]) + 4 * math.prod(embedding)


def _count_gathered(shapes: Shapes) -> int:
    """Return the most parameters gathered at a time: those outside blocks, and the two largest blocks."""
    blocks: dict[str, int] = {}
    for name, shape in shapes.items():
        match = BLOCK_NAME.match(name)
        block = match[1] if match else ""
        blocks[block] = blocks.get(block, 0) + math.prod(shape)
    outside = blocks.pop("", 0)
    return outside + sum(sorted(blocks.values())[-2:])


def free_memory(device: str, ranks: int) -> tuple[int, int]:
    """Return the bytes that are free on a device now, and how many of the ranks share them."""
    if device == "cpu":
        return machine.available_memory(), ranks
    return torch.cuda.mem_get_info(device)[0], math.ceil(ranks / torch.cuda.device_count())


def check_memory(needed: MemoryEstimate, available: int, ranks: int, device: str, tokens: int) -> None:
    """Raise InputError if a device does not have the memory that its ranks need together."""
    total = ranks * needed.total
    if total <= available:
        return
    smaller_passes_fit = ranks * (needed.total - needed.activations) <= available
    if smaller_passes_fit and needed.saving + needed.loading == 0:
        advice = "lower runtime.token_budget"
    elif ranks > 1:
        advice = "lower runtime.train_processes"
    else:
        advice = 'take a smaller model, train.dtype = "bfloat16", or a larger machine'
    raise InputError(
        f"training needs about {total / GIB:.2f} GiB on {device}, {available / GIB:.2f} GiB are free "
        f"({'' if ranks == 1 else f'{ranks} processes, each '}{needed} GiB; largest pass: {tokens} tokens): {advice}"
    )


def count_parameters(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))
