"""Prompt lengths equal the processor's, and an engine leaves out prompts that are too long."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from demo import families
from masters.config import Generate, Runtime
from masters.models.generation.engine import Engine, Reply, Request
from masters.models.prompts import PromptLengthCounter, chat_prompt, model_inputs
from masters.store.tables import PROMPT_TOO_LONG
from tests.fork_server.call import call_in_process

SIZES = [(1, 1), (40, 40), (64, 64), (57, 200), (1920, 1080), (1080, 1920)]
QUESTIONS = ["?", "what shape is it?", "👩‍👩‍👧‍👦" * 500, "ما لون الشكل؟\n" * 9, "  two  spaces "]
LARGE = 1_000_000  # pixels of an image that Qwen's published processors would keep
SAMPLING = Generate(max_tokens=8, dtype="float32").sampling


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), (200, 30, 30), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def processor_for_large_images(folder: Path):
    """Return the tiny model's processor, with the image size limit of published processors."""
    processor = AutoProcessor.from_pretrained(folder)
    if hasattr(processor.image_processor, "max_patches"):
        processor.image_processor.max_patches = 12
    else:
        processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": LARGE}
    return processor


@pytest.mark.parametrize("name", families.NAMES)
def test_counted_tokens_equal_the_processors(name: str, tmp_path: Path) -> None:
    folder = families.save(name, tmp_path / "model", ["what shape is it?"])
    for processor in (AutoProcessor.from_pretrained(folder), processor_for_large_images(folder)):
        count, seen = PromptLengthCounter(processor), set()
        cases = [(size, "what?") for size in SIZES] + [((64, 64), each) for each in QUESTIONS]
        for size, question in cases:
            made = model_inputs(processor, question, png(*size))["input_ids"].shape[1]
            assert count(chat_prompt(processor, question), size) == made, (size, question[:20])
            seen.add(made)
        assert len(seen) > len(QUESTIONS)  # sizes and words both count
    assert max(seen) > 2000


def generate(folder: Path, requests: list[Request], runtime: Runtime) -> list[list[Reply]]:
    with Engine(folder, "float32", runtime) as engine:
        return engine.generate(requests, SAMPLING)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_an_engine_leaves_out_prompts_that_are_too_long(name: str, tmp_path: Path) -> None:
    folder = families.save(name, tmp_path / "model", ["what shape is it?"])
    processor = processor_for_large_images(folder)
    processor.save_pretrained(folder)
    small, large = png(64, 64), png(1000, 800)
    prompt_tokens = len(model_inputs(processor, "?", small)["input_ids"][0])
    fitting = (
        "a" * (256 - SAMPLING.max_tokens - prompt_tokens) + "?"
    )  # exactly fits: the tokenizer merges no run of "a"
    requests = [
        Request(small, "what shape is it?", 2, 1),
        Request(large, "what shape is it?", 2, 1),
        Request(small, "👩‍👩‍👧‍👦" * 100, 3, 1),
        Request(small, fitting, 1, 1),
        Request(small, "a" + fitting, 1, 1),
    ]
    found = call_in_process(generate, folder, requests, Runtime(max_model_len=256))
    too_long = Reply([], [], "", PROMPT_TOO_LONG)
    assert [len(replies) for replies in found] == [request.samples for request in requests]
    assert (found[1], found[2], found[4]) == ([too_long] * 2, [too_long] * 3, [too_long])
    for request, replies in ((requests[0], found[0]), (requests[3], found[3])):
        made = model_inputs(processor, request.question, request.image)["input_ids"][0].tolist()
        assert all(reply.prompt_token_ids == made and reply.response_token_ids for reply in replies)
    assert len(found[3][0].prompt_token_ids) == 256 - SAMPLING.max_tokens
    alone = call_in_process(generate, folder, [replace(requests[1], samples=1)], Runtime(max_model_len=256))
    assert alone == [[too_long]]  # also if no request fits
