"""Limits of an engine, checked before it starts: the memory of its cache, and the number of its devices."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from masters.checks.engine_limits import (
    cache_bytes_per_token,
    check_attention_heads,
    check_cache_memory,
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


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_cache_is_as_large_as_vllms(dtype: str, devices: int) -> None:
    """vLLM's own arithmetic for the heads of a device and for a layer is the reference."""
    from vllm.config import ModelConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    text_config = AutoConfig.from_pretrained(STUDENT).get_text_config()
    model: Any = SimpleNamespace(
        use_mla=False, model_arch_config=SimpleNamespace(total_num_kv_heads=text_config.num_key_value_heads)
    )
    parallel: Any = SimpleNamespace(tensor_parallel_size=devices)
    spec = FullAttentionSpec(
        block_size=16,
        num_kv_heads=ModelConfig.get_num_kv_heads(model, parallel),
        head_size=text_config.head_dim,
        dtype=getattr(torch, dtype),
    )
    expected = text_config.num_hidden_layers * spec.page_size_bytes / 16
    assert cache_bytes_per_token(text_config, dtype, devices) == expected


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (1, 57_344),  # 28 layers x 4 heads x 128 values x 2 (key and value) x 2 bytes
        (2, 28_672),
        (4, 14_336),
        (28, 14_336),  # each head on seven devices
    ],
)
def test_key_value_heads_are_replicated_on_more_devices(devices: int, expected: int) -> None:
    assert cache_bytes_per_token(LARGE, "bfloat16", devices) == expected


def test_a_cache_larger_than_the_machine_is_refused() -> None:
    check_cache_memory(Runtime(engine_memory_gib=8), 8.0)
    with pytest.raises(InputError, match=r"engine_memory_gib: expected at most the 7.9 GiB .*, found 8: lower it"):
        check_cache_memory(Runtime(engine_memory_gib=8), 7.9)


def test_a_check_compares_the_cache_with_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    config = make_config("store", "digits", runtime=dict(engine_memory_gib=2**20))
    with pytest.raises(InputError, match="found 1048576: lower it"):
        check_engine_limits(config, [])


def test_a_cache_that_holds_no_sequence_is_refused() -> None:
    check_cache_size("m", LARGE, Runtime(), "bfloat16")
    check_cache_size("m", LARGE, Runtime(max_model_len=32_768, engine_memory_gib=2), "bfloat16")
    with pytest.raises(InputError, match="model m: 32768 tokens .* take 1.75 GiB of KV cache.*gives 1: raise it to 2"):
        check_cache_size("m", LARGE, Runtime(max_model_len=32_768), "bfloat16")


def test_a_cache_with_replicated_heads_is_refused_if_it_is_too_small() -> None:
    # 100,000 tokens x 14,336 bytes are 1.34 GiB on each device, on 28 devices as on 4
    for devices in (4, 28):
        with pytest.raises(InputError, match=r"take 1\.34 GiB of KV cache.*gives 1: raise it to 2"):
            check_cache_size("m", LARGE, Runtime(max_model_len=100_000, tensor_parallel_size=devices), "bfloat16")


def test_heads_are_divided_among_devices() -> None:
    """28 attention heads on 7 or 14 devices would leave some of them a part of one of the 4 key-value heads."""
    accepted = []
    for devices in range(1, 65):
        try:
            check_attention_heads("m", LARGE, devices)
            accepted.append(devices)
        except InputError as error:
            assert "does not divide the 28 attention heads and 4 key-value heads of model m" in str(error)
    assert accepted == [1, 2, 4, 28]


def test_the_demo_models_are_accepted_on_one_device_only() -> None:
    model = find_model(Model(model=str(STUDENT)))
    check_engine_limits(make_config("store", "digits"), [model])
    with pytest.raises(InputError, match="runtime.tensor_parallel_size is 3, "):
        check_engine_limits(make_config("store", "digits", runtime=dict(tensor_parallel_size=3)), [model])
