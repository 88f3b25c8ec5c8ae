"""Prompts are counted as the processor makes them, and an engine sets aside the ones that it cannot take."""

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


def keeps_large_images(folder: Path):
    """The family's tiny model with a processor that shrinks an image no further than a published one."""
    processor = AutoProcessor.from_pretrained(folder)
    if hasattr(processor.image_processor, "max_patches"):
        processor.image_processor.max_patches = 12
    else:
        processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": LARGE}
    return processor


@pytest.mark.parametrize("name", families.NAMES)
def test_tokens_are_counted_as_the_processor_makes_them(name: str, tmp_path: Path) -> None:
    folder = families.save(name, tmp_path / "model", ["what shape is it?"])
    for processor in (AutoProcessor.from_pretrained(folder), keeps_large_images(folder)):
        count, seen = PromptLengthCounter(processor), set()
        cases = [(size, "what?") for size in SIZES] + [((64, 64), each) for each in QUESTIONS]
        for size, question in cases:
            made = model_inputs(processor, question, png(*size))["input_ids"].shape[1]
            assert count(chat_prompt(processor, question), size) == made, (size, question[:20])
            seen.add(made)
        assert len(seen) > len(QUESTIONS)  # sizes and words both count
    assert max(seen) > 2000


def answered(folder: Path, requests: list[Request], runtime: Runtime) -> list[list[Reply]]:
    with Engine(folder, "float32", runtime) as engine:
        return engine.generate(requests, SAMPLING)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_an_engine_sets_aside_what_it_cannot_take_and_answers_the_rest(name: str, tmp_path: Path) -> None:
    folder = families.save(name, tmp_path / "model", ["what shape is it?"])
    processor = keeps_large_images(folder)
    processor.save_pretrained(folder)
    small, large = png(64, 64), png(1000, 800)
    whole = len(model_inputs(processor, "?", small)["input_ids"][0])
    fitting = "a" * (256 - SAMPLING.max_tokens - whole) + "?"  # to the last token, as no text has such a merge
    asked = [
        Request(small, "what shape is it?", 2, 1), Request(large, "what shape is it?", 2, 1),
        Request(small, "👩‍👩‍👧‍👦" * 100, 3, 1), Request(small, fitting, 1, 1), Request(small, "a" + fitting, 1, 1),
    ]  # fmt: skip
    found = call_in_process(answered, folder, asked, Runtime(max_model_len=256))
    too_long = Reply([], [], "", PROMPT_TOO_LONG)
    assert [len(replies) for replies in found] == [request.samples for request in asked]
    assert (found[1], found[2], found[4]) == ([too_long] * 2, [too_long] * 3, [too_long])
    for request, replies in ((asked[0], found[0]), (asked[3], found[3])):
        made = model_inputs(processor, request.question, request.image)["input_ids"][0].tolist()
        assert all(reply.prompt_token_ids == made and reply.response_token_ids for reply in replies)
    assert len(found[3][0].prompt_token_ids) == 256 - SAMPLING.max_tokens
    alone = call_in_process(answered, folder, [replace(asked[1], samples=1)], Runtime(max_model_len=256))
    assert alone == [[too_long]]  # also an engine that can ask nothing says so
