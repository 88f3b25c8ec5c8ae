"""Refuses what an engine would refuse when it starts: too many devices for a model, or too small a cache."""

import math
from typing import Any

import psutil
import torch
from transformers import AutoConfig

from masters.checks.model_folder import LocalModel
from masters.common.errors import InputError
from masters.config import Config, Runtime
from masters.models.training.memory_estimate import GIB


def check_engine_limits(config: Config, models: list[LocalModel]) -> None:
    """Raise InputError if an engine could not start on one of the models of supported families."""
    runtime = config.runtime
    is_here = not runtime.ray_address and not runtime.pools.generate
    gpus = torch.cuda.device_count() if is_here else 0
    if gpus and runtime.tensor_parallel_size > gpus:
        raise InputError(
            f"runtime.tensor_parallel_size is {runtime.tensor_parallel_size}, expected at most the {gpus} GPUs of this "
            "machine: lower it"
        )
    if is_here and not gpus:
        check_cache_memory(runtime, psutil.virtual_memory().total / GIB)
    for model in models:
        text_config = AutoConfig.from_pretrained(model.folder, trust_remote_code=False).get_text_config()
        check_attention_heads(model.name, text_config, runtime.tensor_parallel_size)
        if is_here and not gpus:
            check_cache_size(model.name, text_config, runtime, config.generate.dtype)


def check_attention_heads(name: str, text_config: Any, devices: int) -> None:
    """Raise InputError unless the model's attention heads can be divided among the devices of an engine."""
    heads, key_heads = text_config.num_attention_heads, text_config.num_key_value_heads
    if heads % devices or (key_heads % devices and devices % key_heads):
        largest = math.gcd(heads, key_heads)
        raise InputError(
            f"runtime.tensor_parallel_size is {devices}, which does not divide the {heads} attention heads and "
            f"{key_heads} key-value heads of model {name}: choose a common divisor, such as {largest}"
        )


def check_cache_size(name: str, text_config: Any, runtime: Runtime, dtype: str) -> None:
    """Raise InputError if the KV cache on a CPU does not hold a single sequence of the maximum length."""
    length, size = runtime.context_length(text_config.max_position_embeddings), runtime.kv_cache_gib
    needed = length * cache_bytes_per_token(text_config, dtype, runtime.tensor_parallel_size) / GIB
    if needed > size:
        raise InputError(
            f"model {name}: {length} tokens (runtime.max_model_len) take {needed:.2f} GiB of KV cache, "
            f"runtime.engine_memory_gib gives {size}: raise it to {math.ceil(needed)}, or lower runtime.max_model_len"
        )


def check_cache_memory(runtime: Runtime, memory_gib: float) -> None:
    """Raise InputError if an engine's KV cache on a CPU is larger than the memory of this machine, in GiB."""
    if runtime.kv_cache_gib > memory_gib:
        raise InputError(
            f"runtime.engine_memory_gib: expected at most the {memory_gib:.1f} GiB of this machine's memory for an "
            f"engine's KV cache, found {runtime.kv_cache_gib}: lower it"
        )


def cache_bytes_per_token(text_config: Any, dtype: str, devices: int) -> int:
    """Return the bytes of keys and values of one token in all layers, on one of an engine's devices.

    Each device holds its share of the key-value heads, at least one: with more devices than heads, the heads are
    replicated. The supported families attend to all tokens.
    """
    head_size = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    key_heads = max(1, text_config.num_key_value_heads // devices)
    values = 2 * text_config.num_hidden_layers * key_heads * head_size
    return values * getattr(torch, dtype).itemsize
