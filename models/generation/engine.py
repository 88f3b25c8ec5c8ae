"""Generation with vLLM, the only place that imports it: one engine serves all mask ratios of a model.

Determinism: an engine's samples depend on what else is in the batch, so callers hand over fixed lists of requests
(shards); each list meets an idle engine with empty caches and every request carries its own seed.
"""

import gc
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from masters.common.errors import InputError
from masters.config import Generate, Runtime
from masters.models import devices
from masters.models.masking import safetensors_tensors
from masters.models.model_loading import masked_tensors
from masters.models.prompts import PromptLength, chat, conversation_tokens, opened
from masters.rewards.judge_prompts import Conversation
from masters.store.tables import PROMPT_TOO_LONG

# read by vLLM when it is imported: in-process engine (7 s to start instead of 40), threads left to the system
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

BATCHED_TOKENS = 8192
RAISE = "raise runtime.max_model_len, shorten the questions or shrink the images"
# GPUs keep vLLM's defaults, CUDA graphs and chunked prefill. On a CPU compiling takes longer than it saves, and a
# half-prefilled request with a seed rewinds its random generator, which a CPU generator cannot
START: dict[str, dict[str, Any]] = {"gpu": {}, "cpu": dict(enforce_eager=True, enable_chunked_prefill=False)}


@dataclass(frozen=True)
class Request:
    """One question to an engine: `samples` responses seeded `seed`, `seed + 1`, ..."""

    image: bytes
    question: str
    samples: int
    seed: int


@dataclass(frozen=True)
class Reply:
    """What an engine answered once: the prompt as the model saw it (image tokens expanded) and the response.

    Nothing, with `finish_reason` PROMPT_TOO_LONG, where the question could not be asked.
    """

    prompt_token_ids: list[int]
    response_token_ids: list[int]
    text: str
    finish_reason: str


def settings(folder: Path, dtype: str, runtime: Runtime, own_code: bool = False) -> dict[str, Any]:
    """How vLLM serves a model, whoever asks it. To be called before vLLM is imported: sets what that reads."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(runtime.engine_memory_gib)))
    devices.claim(runtime.tensor_parallel_size)  # before vLLM looks
    from transformers import AutoConfig
    from vllm.platforms import current_platform

    config = AutoConfig.from_pretrained(folder, trust_remote_code=own_code)
    length = min(runtime.max_model_len, config.get_text_config().max_position_embeddings)
    return dict(
        model=str(folder), dtype=dtype, load_format="safetensors", trust_remote_code=own_code, max_model_len=length,
        max_num_batched_tokens=max(BATCHED_TOKENS, length), tensor_parallel_size=runtime.tensor_parallel_size,
        worker_extension_cls="masters.models.generation.engine.MaskExtension", disable_log_stats=True,
        **START["gpu" if current_platform.is_cuda_alike() else "cpu"],
    )  # fmt: skip


def only_words(llm: Any, tokenizer: Any) -> None:
    """Have an engine never sample an id that the tokenizer does not have."""
    llm.collective_rpc("only_words", args=(1 + max(tokenizer.get_vocab().values()),))


class MaskExtension:
    """Mixed into vLLM's worker: other weights for a running engine. Masks are taken of the checkpoint's tensors before
    they enter, as vLLM fuses them after."""

    reload_weights: Callable[..., None]  # the worker's
    model_runner: Any  # the worker's

    def remask(self, folder: str, thresholds: dict[str, float]) -> None:
        self.reload_weights(weights_iterator=masked_tensors(Path(folder), thresholds))

    def load(self, folder: str) -> None:
        """Take the weights of another folder.

        A head that shares the embedding's weight loads none of its own, and on a CPU vLLM multiplies by a packed copy
        of it, which would stay that of the weights before.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        self.reload_weights(weights_iterator=safetensors_tensors(Path(folder)))
        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)

    def only_words(self, count: int) -> None:
        """Give ids from `count` on probability zero: rows that pad the embedding matrix and stand for no token."""
        model = self.model_runner.get_model()
        compute = model.compute_logits

        def compute_logits(*args: object, **kwargs: object):
            logits = compute(*args, **kwargs)
            if logits is not None:  # only one rank has them
                logits[..., count:] = -math.inf
            return logits

        model.compute_logits = compute_logits


class Engine:
    """A vLLM engine on one model folder. Use as a context manager; a process holds one at a time."""

    def __init__(
        self, folder: Path, dtype: str, runtime: Runtime, own_code: bool = False, sleeps: bool = False
    ) -> None:
        """Start the engine. `own_code`: the model runs code of its own; preflight has asked whether it may. `sleeps`:
        `sleep` is to free the device's memory, where vLLM can do that."""
        chosen = settings(folder, dtype, runtime, own_code)
        from transformers import AutoProcessor
        from vllm import LLM
        from vllm.platforms import current_platform

        self._sleeps = sleeps and current_platform.is_sleep_mode_available()
        if self._sleeps:
            chosen["enable_sleep_mode"] = True
        self.folder, self.own_code = folder, own_code
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=own_code)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)  # a model of text alone has no processor
        self.llm = LLM(**chosen, limit_mm_per_prompt={"image": 1, "video": 0}, seed=0)
        only_words(self.llm, self.tokenizer)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()

    def remask(self, thresholds: dict[str, float]) -> None:
        """Serve the model masked at these thresholds; an empty dict serves it untouched."""
        self.llm.collective_rpc("remask", args=(str(self.folder), thresholds))
        self.reset()

    def load(self, folder: Path) -> None:
        """Serve the weights of another folder, of the same architecture, tokenizer and processor, from now on.

        The engine answers as one that was started on that folder.
        """
        self.folder = folder
        self.llm.collective_rpc("load", args=(str(folder),))
        self.reset()

    def sleep(self) -> None:
        """Free the device's memory until `wake`; nothing on a CPU, where vLLM has no such mode."""
        if self._sleeps:
            self.llm.sleep(level=1)

    def wake(self) -> None:
        """Take the device's memory again after `sleep`."""
        if self._sleeps:
            self.llm.wake_up()

    def reset(self) -> None:
        """Empty every cache, the scheduler's encoder cache too: it would answer for weights that are gone."""
        self.llm.reset_prefix_cache()
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()

    def generate(self, requests: list[Request], sampling: Generate) -> list[list[Reply]]:
        """Answer all requests as one batch; a list of `samples` replies per request, in order.

        Where prompt and longest response exceed the engine's length they say so: vLLM would refuse the whole batch.
        """
        self.reset()
        prompts = [self._prompt(request) for request in requests]
        fits = [self._tokens(prompt) + sampling.max_tokens <= self.length for prompt in prompts]
        asked = [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]
        wanted = [self._sampling(request, sampling) for request, fit in zip(requests, fits, strict=True) if fit]
        outputs = iter(self.llm.generate(asked, wanted, use_tqdm=False) if asked else [])
        return [
            _replies(next(outputs)) if fit else [Reply([], [], "", PROMPT_TOO_LONG)] * request.samples
            for request, fit in zip(requests, fits, strict=True)
        ]

    def converse(self, conversations: list[Conversation], max_tokens: int) -> list[Reply | None]:
        """Continue each conversation, text alone, greedily, all as one batch; None where it cannot be asked."""
        from vllm import SamplingParams

        self.reset()
        room = self.length - max_tokens
        prompts = [conversation_tokens(self.processor, self.tokenizer, each) for each in conversations]
        fits = [ids is not None and len(ids) <= room for ids in prompts]
        asked: list[Any] = [{"prompt_token_ids": ids} for ids, fit in zip(prompts, fits, strict=True) if fit]
        greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        outputs = iter(self.llm.generate(asked, greedy, use_tqdm=False) if asked else [])
        return [_replies(next(outputs))[0] if fit else None for fit in fits]

    def greedy(self, requests: list[Request], tokens: int) -> list[tuple[list[int], list[float]]]:
        """Greedy answers of at most `tokens` tokens: ids and their log-probabilities. Raises InputError."""
        from vllm import SamplingParams

        self.reset()
        prompts = [self._prompt(request) for request in requests]
        if (longest := max(map(self._tokens, prompts), default=0) + tokens) > self.length:
            raise InputError(f"a prompt and its answer take {longest} tokens, the engine admits {self.length}: {RAISE}")
        wanted = SamplingParams(temperature=0.0, max_tokens=tokens, logprobs=1)
        outputs = self.llm.generate(prompts, wanted, use_tqdm=False)
        answers: list[Any] = [out.outputs[0] for out in outputs]
        return [
            (list(a.token_ids), [at[token].logprob for token, at in zip(a.token_ids, a.logprobs, strict=True)])
            for a in answers
        ]

    @property
    def length(self) -> int:
        """Tokens of a prompt and its response together."""
        return self.llm.llm_engine.model_config.max_model_len

    @cached_property
    def _count(self) -> PromptLength:
        return PromptLength(self.processor)

    def _tokens(self, prompt: dict[str, Any]) -> int:
        return self._count(prompt["prompt"], prompt["multi_modal_data"]["image"].size)

    def _prompt(self, request: Request) -> Any:
        text, image = chat(self.processor, request.question), opened(request.image)
        return {"prompt": text, "multi_modal_data": {"image": image}}

    def _sampling(self, request: Request, sampling: Generate):
        from vllm import SamplingParams

        greedy = sampling.temperature == 0
        return SamplingParams(
            n=request.samples,
            seed=request.seed,
            temperature=sampling.temperature,
            top_p=1.0 if greedy else sampling.top_p,
            top_k=0 if greedy else sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=sampling.max_tokens,
        )


def _replies(out: Any) -> list[Reply]:
    """A request's replies from vLLM's output, in order of sample."""
    return [
        Reply(list(out.prompt_token_ids), list(o.token_ids), o.text, str(o.finish_reason))
        for o in sorted(out.outputs, key=lambda o: o.index)
    ]
