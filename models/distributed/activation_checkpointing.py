"""Activation checkpointing: a transformer block keeps its inputs alone, and is computed again in the backward pass."""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from masters.models.distributed.base import transformer_blocks


def checkpoint_activations(model: torch.nn.Module) -> None:
    """Let every block of a model be computed twice. Gradients are the same; names and hooks of modules stay.

    Where weights are sharded a block has them gathered anyway while its backward pass runs.
    """
    for block in transformer_blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
