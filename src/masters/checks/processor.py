"""Check of a model's processor and chat template: do they make prompts that the trainer and the engine can use?

A short question is processed with a small and with a large image. The result is compared with the model's
configuration, and teacher and student are compared with each other.
"""

import io
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from masters.common.errors import InputError
from masters.common.hashing import digest
from masters.models.families import family_of
from masters.models.prompts import chat_prompt, model_inputs, vocabulary_size

QUESTION = "what shape is it?"
SMALL_SIDE = 64  # pixels
LARGE_SIZE = (2048, 1536)  # pixels
PIXEL_SAMPLES = 32  # per image
PIXEL_TOLERANCE = 0.05  # in units of the processed pixels, which lie in about 0..1 or -1..1
MAX_ERROR_CHARACTERS = 300
# A mark around a model's thoughts, such as <think>, </thinking>, [THINK], <|begin_of_thought|> or <|channel|>analysis
THOUGHT_MARK = re.compile(
    r"[<\[◁][^\s<>\[\]◁▷]*(?:think|thought|reason|analysis|reflection|scratchpad)[^\s<>\[\]◁▷]*\s*[>\]▷]"
    r"|<\|channel\|?>\s*\w+|<channel\|>",
    re.I,
)
CLOSING = re.compile(r"/|end|final|^<channel\|>", re.I)


@dataclass(frozen=True)
class ProcessorOutput:
    """Result of processing the question with both images, and what it says of the model's template and embedding."""

    prompt: int  # tokens with the small image
    large: int  # tokens with the large image
    made: str  # digest of both results: tokens, other integers, and the shapes of the processed images
    pixels: list[float]  # samples of both processed images
    positions: int
    opened_thought: str  # see `find_opened_thought`
    padding: int  # rows of the embedding beyond the tokenizer's last entry

    def describe_difference(self, other: "ProcessorOutput") -> str:
        """Return how the prompts of two models differ; empty if they are equal."""
        if (self.prompt, self.large) != (other.prompt, other.large):
            return (
                f"{self.prompt} and {other.prompt} tokens with a small image, {self.large} and {other.large} with a "
                "large one"
            )
        if self.made != other.made:
            return "different tokens"
        if any(abs(a - b) > PIXEL_TOLERANCE for a, b in zip(self.pixels, other.pixels, strict=True)):
            return "different pixels (mean, standard deviation or resampling)"
        return ""


def run_processor(folder: Path) -> ProcessorOutput:
    """Check the processor of a supported family's model. Raises InputError naming the fault and its file."""
    config, processor = _load_config(folder), _load_processor(folder)
    vocabulary = config.get_text_config().vocab_size
    small = _process(folder, processor, Image.new("RGB", (SMALL_SIDE, SMALL_SIDE), (200, 30, 30)))
    ids = small["input_ids"][0].tolist()
    check_image_tokens(folder, config, processor, small)
    count = processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False).count(QUESTION)
    if count != 1:
        raise _fault(folder, f"its chat template writes the question {count} times, expected once")
    if (tokens := vocabulary_size(processor.tokenizer)) > vocabulary:
        raise _fault(folder, f"its tokenizer has a token {tokens - 1}, config.json a vocabulary of {vocabulary}")
    check_end_tokens(folder, vocabulary)
    large = _process(folder, processor, _gradient_image())
    tensors = [tensor for inputs in (small, large) for _, tensor in sorted(inputs.items())]
    images = [tensor for tensor in tensors if tensor.is_floating_point()]
    integers = [tensor.tolist() for tensor in tensors if not tensor.is_floating_point()]
    return ProcessorOutput(
        prompt=len(ids),
        large=large["input_ids"].shape[1],
        made=digest(repr((integers, [tuple(image.shape) for image in images])).encode()),
        pixels=[value for image in images for value in _sample_pixels(image)],
        positions=config.get_text_config().max_position_embeddings,
        opened_thought=find_opened_thought(processor),
        padding=vocabulary - tokens,
    )


def find_opened_thought(processor: Any) -> str:
    """Return the mark, such as "<think>", of a thought that the prompt opens and does not close; empty if none."""
    _, _, behind_question = chat_prompt(processor, QUESTION).rpartition(QUESTION)
    marks = [mark.group() for mark in THOUGHT_MARK.finditer(behind_question)]
    return "" if not marks or CLOSING.search(marks[-1]) else marks[-1]


def _sample_pixels(image: torch.Tensor) -> list[float]:
    indices = torch.linspace(0, image.numel() - 1, PIXEL_SAMPLES, dtype=torch.float64).long()
    return [round(value, 4) for value in image.flatten()[indices].tolist()]


def _gradient_image() -> Image.Image:
    """Return a large image in which no two regions are equal."""
    gray = Image.linear_gradient("L")
    channels = (gray, gray.rotate(90), gray.rotate(180))
    return Image.merge("RGB", [channel.resize(LARGE_SIZE) for channel in channels])


def check_image_tokens(folder: Path, config: Any, processor: Any, inputs: dict[str, Any]) -> None:
    """Raise InputError unless the prompt has one run of image tokens, as many as the model computes for the image."""
    if (token := processor.image_token_id) != config.image_token_id:
        raise _fault(folder, f"config.json's image_token_id is {config.image_token_id}, its processor's {token}")
    runs = [len(list(run)) for value, run in groupby(inputs["input_ids"][0].tolist()) if value == token]
    if len(runs) != 1:
        raise _fault(folder, f"its chat template puts the image {len(runs)} times into the prompt, expected once")
    expected = family_of(config.model_type).count_image_tokens(config, inputs)
    if runs[0] != expected:
        raise _fault(
            folder,
            f"its processor gives an image of {SMALL_SIDE} x {SMALL_SIDE} pixels {runs[0]} tokens, the model that "
            f"config.json describes {expected}: their patch and merge sizes must be the same",
        )


def check_end_tokens(folder: Path, vocabulary: int) -> None:
    """Raise InputError if generation_config.json, where there is one, ends responses with tokens that do not exist."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return
    try:
        found = GenerationConfig.from_pretrained(folder).eos_token_id
    except Exception as error:  # transformers raises many types of errors
        raise _fault(folder, f"its generation_config.json cannot be read ({_describe(error)})") from error
    tokens = found if isinstance(found, list) else [] if found is None else [found]
    if invalid := [token for token in tokens if type(token) is not int or not 0 <= token < vocabulary]:
        raise _fault(
            folder,
            f"its generation_config.json ends responses with the token {invalid[0]!r:.50}, "
            f"expected numbers below {vocabulary}",
        )


def _load_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise _fault(folder, f"its config.json cannot be loaded ({_describe(error)})") from error


def _load_processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise _fault(
            folder,
            f"its processor cannot be loaded from processor_config.json or preprocessor_config.json "
            f"({_describe(error)})",
        ) from error
    if not hasattr(processor, "image_processor"):
        raise _fault(folder, "expected processor_config.json or preprocessor_config.json, found no image processor")
    return processor


def _process(folder: Path, processor: Any, image: Image.Image) -> dict[str, Any]:
    """Return the model inputs for the question with an image."""
    try:
        chat_prompt(processor, QUESTION)
    except Exception as error:
        raise _fault(folder, f"its chat template cannot be used ({_describe(error)})") from error
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    try:
        return model_inputs(processor, QUESTION, buffer.getvalue())
    except Exception as error:
        raise _fault(
            folder, f"its processor and chat template make no prompt of an image and a question ({_describe(error)})"
        ) from error


def _describe(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:MAX_ERROR_CHARACTERS]


def _fault(folder: Path, fault: str) -> InputError:
    return InputError(f"model {folder}: {fault}; use the model's files as published, or download the model again")
