"""Attention that skips the blocks of a packed row in which no token sees another: FlexAttention, for GPUs.

Registered under a name of its own: transformers offers its own only for model classes that declare it, which the text
models of Qwen2.5-VL and Qwen3-VL do not, though they hand a `BlockMask` on as it is.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

NAME = "packed_blocks"  # of the text model's `attn_implementation`
BLOCK = 128  # tokens on each side of a block
VARIANTS = 64  # of a compiled function: lengths, models, with and without gradients; beyond, it would run uncompiled


def attend(
    module: torch.nn.Module,
    query_BHLD: torch.Tensor,
    key_BKLD: torch.Tensor,
    value_BKLD: torch.Tensor,
    attention_mask: BlockMask,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """What transformers asks of an attention function: outputs [B, L, H, D], no weights. H heads, K of keys."""
    attention = compiled() if query_BHLD.is_cuda else flex_attention
    shared = query_BHLD.shape[1] != key_BKLD.shape[1]
    # autocast leaves them alone, and rotated queries and keys have the rotation's type
    query_BHLD, key_BKLD = (part.to(value_BKLD.dtype) for part in (query_BHLD, key_BKLD))
    found = attention(query_BHLD, key_BKLD, value_BKLD, block_mask=attention_mask, scale=scaling, enable_gqa=shared)
    return found.transpose(1, 2).contiguous(), None


def whole(tokens: int) -> int:
    """The length of a row that holds these tokens in whole blocks."""
    return -(-tokens // BLOCK) * BLOCK


def mask(visible: Callable[..., torch.Tensor], rows: int, length: int, device: torch.device) -> BlockMask:
    """The blocks in which `visible(row, head, query, key)` lets some token see another."""
    make = compiled_mask() if device.type == "cuda" else create_block_mask
    return make(visible, rows, None, length, length, device, BLOCK)


@cache
def compiled():
    return torch.compile(flex_attention, recompile_limit=VARIANTS)  # pyright: ignore[reportCallIssue]  # declared late


@cache
def compiled_mask():
    """Compiled, it never holds the dense mask."""
    return torch.compile(create_block_mask, recompile_limit=VARIANTS)  # pyright: ignore[reportCallIssue]


AttentionInterface.register(NAME, attend)
