"""FlexAttention for packed rows on GPUs: it skips blocks of the mask in which no token sees another.

Registered under its own name: transformers offers FlexAttention only for model classes that declare support, which the
text models of Qwen2.5-VL and Qwen3-VL do not, although they pass a `BlockMask` on unchanged.

Shapes: B rows, H query heads, K key heads, L packed length, D head dimension.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

NAME = "packed_blocks"  # value of the text model's `attn_implementation`
BLOCK_SIZE = 128  # tokens on each side of a block
MAX_VARIANTS = 64  # compiled variants (lengths, models, with and without gradients); further ones would run uncompiled


def attend(
    module: torch.nn.Module,
    query_BHLD: torch.Tensor,
    key_BKLD: torch.Tensor,
    value_BKLD: torch.Tensor,
    attention_mask: BlockMask,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Compute attention, as transformers' interface calls it. Returns outputs [B, L, H, D] and no attention weights."""
    attention = compiled_attention() if query_BHLD.is_cuda else flex_attention
    grouped_queries = query_BHLD.shape[1] != key_BKLD.shape[1]
    # autocast does not cover FlexAttention, and rotated queries and keys have the rotation's type
    query_BHLD, key_BKLD = (part.to(value_BKLD.dtype) for part in (query_BHLD, key_BKLD))
    output_BHLD = attention(
        query_BHLD, key_BKLD, value_BKLD, block_mask=attention_mask, scale=scaling, enable_gqa=grouped_queries
    )
    return output_BHLD.transpose(1, 2).contiguous(), None


def round_up_to_block(tokens: int) -> int:
    """Return the length of a row that holds `tokens` in whole blocks."""
    return -(-tokens // BLOCK_SIZE) * BLOCK_SIZE


def make_block_mask(is_visible: Callable[..., torch.Tensor], rows: int, length: int, device: torch.device) -> BlockMask:
    """Return a mask of the blocks in which `is_visible(row, head, query, key)` lets some token see another."""
    create = compiled_create_block_mask() if device.type == "cuda" else create_block_mask
    return create(is_visible, rows, None, length, length, device, BLOCK_SIZE)


@cache
def compiled_attention():
    return torch.compile(flex_attention, recompile_limit=MAX_VARIANTS)  # pyright: ignore[reportCallIssue]


@cache
def compiled_create_block_mask():
    """Return `create_block_mask`, compiled so that it never holds the dense mask."""
    return torch.compile(create_block_mask, recompile_limit=MAX_VARIANTS)  # pyright: ignore[reportCallIssue]


AttentionInterface.register(NAME, attend)
