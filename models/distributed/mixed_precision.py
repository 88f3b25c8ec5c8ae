"""Products in bfloat16 with weights, optimizer states and sums in float32: PyTorch's autocast around a model.

A step of 1e-6 is far below what bfloat16 tells apart, so weights that are trained stay in float32. What is not trained
needs no such copy: a teacher is loaded in the type that is computed in, and so is pi_ref.
"""

from typing import Any

import torch

from masters.config import Train
from masters.models.families.base import VLM


def frozen_dtype(train: Train) -> str:
    """The type that the weights of teacher and pi_ref have while a student is trained."""
    return train.dtype if train.compute_dtype == "float32" else train.compute_dtype


def computing(model: VLM, train: Train) -> VLM:
    """The model with its products in `train.compute_dtype`, in place; its hidden states come out in that type.

    The vocabulary's products are `chunked_head`'s own, which takes states of one type and weights of another.
    """
    if train.compute_dtype == "float32":
        return model
    inner, kind = model.model, getattr(torch, train.compute_dtype)
    forward = inner.forward

    def compute(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(next(inner.parameters()).device.type, kind):
            out = forward(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state.to(kind)
        return out

    inner.forward = compute
    return model
