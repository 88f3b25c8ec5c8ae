"""Generation with vLLM: one engine serves all mask ratios of a model. Only this module and `vllm_compat` import vLLM.

Determinism: an engine's samples depend on what else is in the batch. So callers pass fixed lists of requests (shards);
each list meets an idle engine with empty caches, and every request has its own seed.
"""

import gc
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from masters.common.errors import InputError
from masters.config import Runtime, Sampling
from masters.models import devices
from masters.models.generation import vllm_compat
from masters.models.prompts import (
    PromptLengthCounter,
    chat_prompt,
    open_image,
    tokenize_conversation,
    vocabulary_size,
)
from masters.rewards.judge_prompts import Conversation
from masters.store.tables import PROMPT_TOO_LONG

MIN_BATCHED_TOKENS = 8192
REMEDY = "raise runtime.max_model_len, shorten the questions or shrink the images"
# GPUs keep vLLM's defaults, CUDA graphs and chunked prefill. On a CPU compiling takes longer than it saves, and a
# half-prefilled request with a seed rewinds its random generator, which a CPU generator cannot
GPU_OPTIONS: dict[str, Any] = {}
CPU_OPTIONS: dict[str, Any] = dict(enforce_eager=True, enable_chunked_prefill=False)


@dataclass(frozen=True)
class Request:
    """One question to an engine: `samples` responses seeded `seed`, `seed + 1`, ..."""

    image: bytes
    question: str
    samples: int
    seed: int


@dataclass(frozen=True)
class Reply:
    """One response of an engine, and the prompt as the model saw it (with image tokens expanded).

    All fields are empty and `finish_reason` is PROMPT_TOO_LONG where the engine does not take the prompt.
    """

    prompt_token_ids: list[int]
    response_token_ids: list[int]
    text: str
    finish_reason: str


def engine_options(folder: Path, dtype: str, runtime: Runtime, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return the arguments with which every engine of this project starts.

    Call it before anything imports vLLM, as it sets environment variables that vLLM then reads.
    """
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(runtime.kv_cache_gib)
    devices.claim_gpus(runtime.tensor_parallel_size)
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    length = runtime.context_length(config.get_text_config().max_position_embeddings)
    options = dict(
        model=str(folder),
        dtype=dtype,
        load_format="safetensors",
        trust_remote_code=trust_remote_code,
        max_model_len=length,
        max_num_batched_tokens=max(MIN_BATCHED_TOKENS, length),
        tensor_parallel_size=runtime.tensor_parallel_size,
        worker_extension_cls=vllm_compat.WORKER_EXTENSION,
        disable_log_stats=True,
    )
    return options | (GPU_OPTIONS if vllm_compat.is_gpu_platform() else CPU_OPTIONS)


def suppress_padding_tokens(llm: Any, tokenizer: Any) -> None:
    """Have an engine never sample an id that the tokenizer does not have."""
    llm.collective_rpc("suppress_padding_tokens", args=(vocabulary_size(tokenizer),))


class Engine:
    """A vLLM engine on one model folder. Use as a context manager; a process has one at a time."""

    def __init__(
        self,
        folder: Path,
        dtype: str,
        runtime: Runtime,
        trust_remote_code: bool = False,
        enable_sleep: bool = False,
    ) -> None:
        """Start the engine.

        `trust_remote_code`: run code that comes with the model, which preflight has allowed. `enable_sleep`: `sleep`
        frees the device's memory, where vLLM can do that.
        """
        options = engine_options(folder, dtype, runtime, trust_remote_code)
        from transformers import AutoProcessor
        from vllm import LLM

        self._can_sleep = enable_sleep and vllm_compat.is_sleep_mode_available()
        if self._can_sleep:
            options["enable_sleep_mode"] = True
        self.folder = folder
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)  # a text-only model has no processor
        self.llm = LLM(**options, limit_mm_per_prompt={"image": 1, "video": 0}, seed=0)
        suppress_padding_tokens(self.llm, self.tokenizer)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        del self.llm
        gc.collect()
        vllm_compat.clean_up()

    def remask(self, thresholds: dict[str, float]) -> None:
        """Serve the model masked at these thresholds; an empty dict serves the whole model."""
        self.llm.collective_rpc("remask", args=(str(self.folder), thresholds))
        self.reset()

    def load_weights(self, folder: Path) -> None:
        """Serve the weights of another folder with the same architecture, tokenizer and processor.

        From then on the engine answers as one that was started on that folder.
        """
        self.folder = folder
        self.llm.collective_rpc("load_weights", args=(str(folder),))
        self.reset()

    def sleep(self) -> None:
        """Free the device's memory until `wake`. On a CPU this does nothing: vLLM cannot sleep there."""
        if self._can_sleep:
            self.llm.sleep(level=1)

    def wake(self) -> None:
        """Take the device's memory again after `sleep`."""
        if self._can_sleep:
            self.llm.wake_up()

    def reset(self) -> None:
        """Empty every cache."""
        vllm_compat.reset_caches(self.llm)

    def generate(self, requests: list[Request], sampling: Sampling) -> list[list[Reply]]:
        """Answer all requests as one batch. Returns a list of `samples` replies per request, in order.

        A request whose prompt and longest response exceed `max_model_len` gets replies with PROMPT_TOO_LONG, as vLLM
        would refuse the whole batch.
        """
        self.reset()
        prompts = [self._prompt(request) for request in requests]
        fits = [self._count_tokens(prompt) + sampling.max_tokens <= self.max_model_len for prompt in prompts]
        admitted = [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]
        params = [self._sampling_params(request, sampling) for request, fit in zip(requests, fits, strict=True) if fit]
        outputs = iter(self.llm.generate(admitted, params, use_tqdm=False) if admitted else [])
        return [
            _replies(next(outputs)) if fit else [Reply([], [], "", PROMPT_TOO_LONG)] * request.samples
            for request, fit in zip(requests, fits, strict=True)
        ]

    def continue_conversations(self, conversations: list[Conversation], max_tokens: int) -> list[Reply | None]:
        """Continue text conversations greedily, all as one batch; None for one that the engine does not take."""
        from vllm import SamplingParams

        self.reset()
        longest_prompt = self.max_model_len - max_tokens
        prompts = [tokenize_conversation(self.processor, self.tokenizer, each) for each in conversations]
        fits = [ids is not None and len(ids) <= longest_prompt for ids in prompts]
        admitted: list[Any] = [{"prompt_token_ids": ids} for ids, fit in zip(prompts, fits, strict=True) if fit]
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        outputs = iter(self.llm.generate(admitted, params, use_tqdm=False) if admitted else [])
        return [_replies(next(outputs))[0] if fit else None for fit in fits]

    def decode_greedily(self, requests: list[Request], max_tokens: int) -> list[tuple[list[int], list[float]]]:
        """Return the greedy response's token ids and their log-probabilities for each request. Raises InputError."""
        from vllm import SamplingParams

        self.reset()
        prompts = [self._prompt(request) for request in requests]
        if (longest := max(map(self._count_tokens, prompts), default=0) + max_tokens) > self.max_model_len:
            raise InputError(
                f"a prompt and its answer take {longest} tokens, the engine admits {self.max_model_len}: {REMEDY}"
            )
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=1)
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        responses: list[Any] = [output.outputs[0] for output in outputs]
        return [
            (list(r.token_ids), [at[token].logprob for token, at in zip(r.token_ids, r.logprobs, strict=True)])
            for r in responses
        ]

    @property
    def max_model_len(self) -> int:
        """The most tokens of a prompt and its response together."""
        return vllm_compat.max_model_len(self.llm)

    @cached_property
    def _prompt_length(self) -> PromptLengthCounter:
        return PromptLengthCounter(self.processor)

    def _count_tokens(self, prompt: dict[str, Any]) -> int:
        return self._prompt_length(prompt["prompt"], prompt["multi_modal_data"]["image"].size)

    def _prompt(self, request: Request) -> Any:
        text, image = chat_prompt(self.processor, request.question), open_image(request.image)
        return {"prompt": text, "multi_modal_data": {"image": image}}

    def _sampling_params(self, request: Request, sampling: Sampling):
        from vllm import SamplingParams

        is_greedy = sampling.temperature == 0
        return SamplingParams(
            n=request.samples,
            seed=request.seed,
            temperature=sampling.temperature,
            top_p=1.0 if is_greedy else sampling.top_p,
            top_k=0 if is_greedy else sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=sampling.max_tokens,
        )


def _replies(output: Any) -> list[Reply]:
    """Return a request's replies from vLLM's output, in order of sample."""
    return [
        Reply(list(output.prompt_token_ids), list(each.token_ids), each.text, str(each.finish_reason))
        for each in sorted(output.outputs, key=lambda each: each.index)
    ]
