"""Greedy answers of one model folder, at several masks one after the other, from vLLM and from transformers."""

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from masters.config import Generate, Runtime
from masters.models.generation.engine import Engine, Request
from tests.fork_server.call import call_in_process
from tests.models.family_questions import load_masked

Masks = list[dict[str, float]]  # thresholds by tensor; empty: the model as it is
GREEDY = Generate(temperature=0.0, repetition_penalty=1.2, max_tokens=24, dtype="float32").sampling  # 1.2: fewer loops


@dataclass(frozen=True)
class Answer:
    prompt: list[int]
    response: list[int]


def from_vllm(folder: Path, masks: Masks, asked: list[tuple[bytes, str]]) -> list[list[Answer]]:
    """Return answers by mask, all from one engine."""
    return call_in_process(_engine_answers, folder, masks, asked)


def _engine_answers(folder: Path, masks: Masks, asked: list[tuple[bytes, str]]) -> list[list[Answer]]:
    requests = [Request(image, question, 1, 0) for image, question in asked]
    found = []
    with Engine(folder, GREEDY.dtype, Runtime(max_model_len=256)) as engine:
        for thresholds in masks:
            engine.remask(thresholds)
            replies = [r for (r,) in engine.generate(requests, GREEDY)]
            found.append([Answer(r.prompt_token_ids, r.response_token_ids) for r in replies])
    return found


def from_transformers(folder: Path, masks: Masks, asked: list[tuple[bytes, str]]) -> list[list[Answer]]:
    """Return answers by mask, one question at a time."""
    from transformers import AutoProcessor

    processor, found = AutoProcessor.from_pretrained(folder), []
    for thresholds in masks:
        model = load_masked(folder, thresholds, GREEDY.dtype)
        found.append([_answer(model, processor, *one) for one in asked])
    return found


@torch.no_grad()
def _answer(model, processor, image: bytes, question: str) -> Answer:
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    text = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    opened = Image.open(io.BytesIO(image)).convert("RGB")
    inputs = processor(text=[text], images=[opened], return_tensors="pt")
    padding = range(len(processor.tokenizer), model.config.get_text_config().vocab_size)  # no tokens
    out = model.generate(
        **inputs, max_new_tokens=GREEDY.max_tokens, do_sample=False, repetition_penalty=GREEDY.repetition_penalty,
        suppress_tokens=list(padding) or None,
    )[0].tolist()  # fmt: skip
    prompt = inputs["input_ids"].shape[1]
    return Answer(out[:prompt], out[prompt:])
