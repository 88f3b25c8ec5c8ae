"""Private parts of vLLM that this project uses, written for vLLM 0.32.0. A new version must be checked against them.

Importing this module sets what vLLM reads when it is imported; vLLM itself is imported where it is used.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from masters.models.masking import iterate_tensors
from masters.models.model_loading import iterate_masked_tensors

VERSION = "0.32.0"

# the engine runs in this process (7 s to start instead of 40), and threads are left to the system
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


class WorkerExtension:
    """Methods that vLLM mixes into its worker (`worker_extension_cls`): they change the weights of a running engine.

    Masks are applied to the checkpoint's tensors before vLLM fuses them.
    """

    reload_weights: Callable[..., None]  # the worker's
    model_runner: Any  # the worker's

    def remask(self, folder: str, thresholds: dict[str, float]) -> None:
        self.reload_weights(weights_iterator=iterate_masked_tensors(Path(folder), thresholds))

    def load_weights(self, folder: str) -> None:
        """Load the weights of another folder.

        A head that shares the embedding's weight loads none itself. On a CPU vLLM multiplies by a packed copy of the
        head's weight, which must be packed again.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        self.reload_weights(weights_iterator=iterate_tensors(Path(folder)))
        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)

    def suppress_padding_tokens(self, vocabulary_size: int) -> None:
        """Give the rows that pad the embedding matrix, which stand for no token, probability zero."""
        model = self.model_runner.get_model()
        original = model.compute_logits

        def compute_logits(*args: object, **kwargs: object):
            logits = original(*args, **kwargs)
            if logits is not None:  # only one rank has them
                logits[..., vocabulary_size:] = -math.inf
            return logits

        model.compute_logits = compute_logits


WORKER_EXTENSION = f"{WorkerExtension.__module__}.{WorkerExtension.__name__}"


def is_gpu_platform() -> bool:
    """Return whether vLLM runs on GPUs. Imports vLLM."""
    from vllm.platforms import current_platform

    return current_platform.is_cuda_alike()


def is_sleep_mode_available() -> bool:
    """Return whether vLLM can free the device's memory for a time. Imports vLLM."""
    from vllm.platforms import current_platform

    return current_platform.is_sleep_mode_available()


def reset_caches(llm: Any) -> None:
    """Empty every cache, also the scheduler's encoder cache, which would answer for weights that are gone."""
    llm.reset_prefix_cache()
    llm.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()


def max_model_len(llm: Any) -> int:
    """Return the most tokens of a prompt and its response together."""
    return llm.llm_engine.model_config.max_model_len


def clean_up() -> None:
    """Release what vLLM's distributed state holds once its engine is deleted."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
