"""For tests/apart.py: what an engine imports, once for all."""

import vllm.v1.engine.llm_engine  # noqa: F401
from vllm import LLM, SamplingParams  # noqa: F401

import masters.models.engine  # noqa: F401  # first: sets what vLLM reads when it is imported
