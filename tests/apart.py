"""Calls in processes of their own, whose memory comes back, forked from one that has loaded vLLM."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

T = TypeVar("T")
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.vllm_loaded"])


def apart(do: Callable[..., T], *arguments: object) -> T:
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        return pool.submit(do, *arguments).result()
