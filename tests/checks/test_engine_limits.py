"""Limits of an engine, checked before it starts: the memory of its cache, and the number of its devices."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from masters.checks.engine_limits import (
    cache_bytes_per_token,
    check_attention_heads,
    check_cache_size,
    check_engine_limits,
)
from masters.checks.model_folder import find_model
from masters.common.errors import InputError
from masters.config import Model, Runtime
from tests.handmade_run import ROOT, make_config

STUDENT = ROOT / "demo/models/student"
LARGE = SimpleNamespace(
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    hidden_size=3584,
    max_position_embeddings=128_000,
)  # Qwen2.5-VL-7B


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_cache_is_as_large_as_vllms(dtype: str) -> None:
    """vLLM's own arithmetic for a layer is the reference."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    text_config = AutoConfig.from_pretrained(STUDENT).get_text_config()
    spec = FullAttentionSpec(
        block_size=16,
        num_kv_heads=text_config.num_key_value_heads,
        head_size=text_config.head_dim,
        dtype=getattr(torch, dtype),
    )
    expected = text_config.num_hidden_layers * spec.page_size_bytes / 16
    assert cache_bytes_per_token(text_config, dtype) == expected


def test_a_cache_that_holds_no_sequence_is_refused() -> None:
    check_cache_size("m", LARGE, Runtime(), "bfloat16")
    check_cache_size("m", LARGE, Runtime(max_model_len=32_768, engine_memory_gib=2), "bfloat16")
    with pytest.raises(InputError, match="model m: 32768 tokens .* take 1.75 GiB of KV cache.*gives 1: raise it to 2"):
        check_cache_size("m", LARGE, Runtime(max_model_len=32_768), "bfloat16")


@given(st.integers(1, 64))
def test_heads_are_divided_among_devices_as_in_vllm(devices: int) -> None:
    is_accepted = 28 % devices == 0 and (4 % devices == 0 or devices % 4 == 0)
    try:
        check_attention_heads("m", LARGE, devices)
    except InputError as error:
        assert not is_accepted and "does not divide the 28 attention heads and 4 key-value heads of model m" in str(
            error
        )
    else:
        assert is_accepted


def test_the_demo_models_are_accepted_on_one_device_only() -> None:
    model = find_model(Model(model=str(STUDENT)))
    check_engine_limits(make_config("store", "digits"), [model])
    with pytest.raises(InputError, match="runtime.tensor_parallel_size is 3, "):
        check_engine_limits(make_config("store", "digits", runtime=dict(tensor_parallel_size=3)), [model])
