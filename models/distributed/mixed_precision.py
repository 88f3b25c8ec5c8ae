"""Mixed precision: matrix products in bfloat16, weights, optimizer states and sums in float32, by PyTorch's autocast.

An update of 1e-6 is far below bfloat16's resolution, so weights that are trained stay in float32. Frozen models need no
float32 copy: the teacher and pi_ref are loaded in the type of the products.
"""

from typing import Any

import torch

from masters.config import Train
from masters.models.families.base import VLM


def frozen_dtype(train: Train) -> str:
    """Return the type of the weights of teacher and pi_ref while a student is trained."""
    return train.dtype if train.compute_dtype == "float32" else train.compute_dtype


def apply_autocast(model: VLM, train: Train) -> VLM:
    """Run a model's products in `train.compute_dtype`, in place; its hidden states have that type too.

    The products with the head's weight are computed by `chunked_head`, which takes hidden states of one type and
    weights of another.
    """
    if train.compute_dtype == "float32":
        return model
    inner, dtype = model.model, getattr(torch, train.compute_dtype)
    forward = inner.forward

    def autocast_forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(next(inner.parameters()).device.type, dtype):
            outputs = forward(*args, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state.to(dtype)
        return outputs

    inner.forward = autocast_forward
    return model
