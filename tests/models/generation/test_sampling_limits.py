"""vLLM accepts every sampling setting that the configuration accepts, unchanged, and refuses what lies outside."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from masters.config import Generate
from masters.config.fields import MAX_INT
from masters.config.sampling import MAX_TEMPERATURE, MIN_TEMPERATURE
from masters.models.generation.engine import Engine, Request

SETTINGS = st.fixed_dictionaries(
    dict(
        temperature=st.floats(0, 1.5 * MAX_TEMPERATURE) | st.sampled_from([0.0, MIN_TEMPERATURE, MAX_TEMPERATURE]),
        top_p=st.floats(0, 1.1) | st.just(1.0),
        top_k=st.integers(-1, 2 * MAX_INT),
        repetition_penalty=st.floats(0, 20),
        max_tokens=st.integers(0, 100_000),
        seed=st.integers(-1, 2 * MAX_INT),
    )
)


def sampling_params(generate: Generate, samples: int, seed: int) -> Any:
    """Return what an engine asks vLLM for; the method uses no engine."""
    request = Request(b"", "", samples, seed)
    return Engine._sampling_params(None, request, generate.sampling)  # pyright: ignore[reportArgumentType]


@given(SETTINGS, st.integers(1, 64))
def test_vllm_takes_unchanged_what_the_configuration_accepts(settings: dict, samples: int) -> None:
    try:
        generate = Generate(**settings)
    except ValidationError:
        return
    params = sampling_params(generate, samples if generate.temperature else 1, generate.seed)
    assert (params.temperature, params.seed) == (generate.temperature, generate.seed)
    assert (params.repetition_penalty, params.max_tokens) == (generate.repetition_penalty, generate.max_tokens)
    if generate.temperature:
        assert (params.top_p, params.top_k) == (generate.top_p, generate.top_k)


def test_the_temperature_has_vllms_own_bounds() -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    assert SamplingParams(temperature=MAX_TEMPERATURE).temperature == MAX_TEMPERATURE
    with pytest.raises(VLLMValidationError, match="temperature"):
        SamplingParams(temperature=MAX_TEMPERATURE + 0.001)
    assert SamplingParams(temperature=MIN_TEMPERATURE / 2).temperature == MIN_TEMPERATURE
    with pytest.raises(VLLMValidationError, match="greedy"):
        SamplingParams(temperature=0, n=2)
