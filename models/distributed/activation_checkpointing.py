"""Activation checkpointing: a transformer block keeps only its inputs and is computed again in the backward pass."""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from masters.models.distributed.base import transformer_blocks


def checkpoint_activations(model: torch.nn.Module) -> None:
    """Checkpoint the activations of every block of a model, in place.

    Gradients stay the same; names and hooks of modules stay. Where weights are sharded, a block has them gathered
    during its backward pass anyway.
    """
    for block in transformer_blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
