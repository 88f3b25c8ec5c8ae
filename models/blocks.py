"""Attention that skips the blocks of a packed row in which no token sees another: FlexAttention, for GPUs.

Registered under a name of its own: transformers offers its own only for model classes that declare it, which the text
models of Qwen2.5-VL and Qwen3-VL do not, though they hand a `BlockMask` on as it is.
"""

from functools import cache

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface

NAME = "packed_blocks"  # of the text model's `attn_implementation`


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
    found = attention(query_BHLD, key_BKLD, value_BKLD, block_mask=attention_mask, scale=scaling, enable_gqa=shared)
    return found.transpose(1, 2).contiguous(), None


@cache
def compiled():
    return torch.compile(flex_attention)


AttentionInterface.register(NAME, attend)
