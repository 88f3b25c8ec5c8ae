"""Whether a model's processor and chat template make prompts that trainer and engine can use: a small picture and a
short question are put through them, and what comes out is compared with the model's configuration. A large picture
is put through too, so that two models can be compared.
"""

import io
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from masters.common.errors import InputError
from masters.common.hashing import digest
from masters.models.families import family_of
from masters.models.prompts import chat, model_inputs

QUESTION = "what shape is it?"
SIDE = 64  # pixels of the small picture
LARGE = (2048, 1536)  # pixels of the other
SAMPLED = 32  # numbers that are kept of a picture
NEAR = 0.05  # of a pixel as models see it, about 0 to 1 or -1 to 1
SAID = 300  # characters of a library's complaint


@dataclass(frozen=True)
class ProcessorOutput:
    """What became of two prompts, and how many positions the model knows."""

    prompt: int  # tokens of the one with the small picture
    large: int  # and of the other
    made: str  # digest over both: their tokens and what else is whole numbers, and the pictures' shapes
    pixels: list[float]  # samples of both pictures as the model sees them
    positions: int

    def unlike(self, other: "ProcessorOutput") -> str:
        """How two models' prompts of the same questions and pictures differ; empty if they do not."""
        if (self.prompt, self.large) != (other.prompt, other.large):
            return (
                f"{self.prompt} and {other.prompt} tokens with a small picture, {self.large} and {other.large} with a "
                "large one"
            )
        if self.made != other.made:
            return "other tokens"
        if any(abs(a - b) > NEAR for a, b in zip(self.pixels, other.pixels, strict=True)):
            return "other pixels (mean, standard deviation or resampling)"
        return ""


def run_processor(folder: Path) -> ProcessorOutput:
    """For models of our families. Raises InputError with what does not fit, and where it is written."""
    config, processor = _config(folder), _processor(folder)
    inputs = _inputs(folder, processor, Image.new("RGB", (SIDE, SIDE), (200, 30, 30)))
    ids, words = inputs["input_ids"][0].tolist(), config.get_text_config().vocab_size
    check_image(folder, config, processor, inputs)
    said = processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if said.count(QUESTION) != 1:
        raise _refused(folder, f"its chat template writes the question {said.count(QUESTION)} times, expected once")
    if (largest := max(processor.tokenizer.get_vocab().values())) >= words:
        raise _refused(folder, f"its tokenizer has a token {largest}, config.json a vocabulary of {words}")
    check_generation(folder, words)
    large = _inputs(folder, processor, _gradients())
    both = [tensor for made in (inputs, large) for _, tensor in sorted(made.items())]
    pictures = [tensor for tensor in both if tensor.is_floating_point()]
    whole = [tensor.tolist() for tensor in both if not tensor.is_floating_point()]
    return ProcessorOutput(
        prompt=len(ids), large=large["input_ids"].shape[1],
        made=digest(repr((whole, [tuple(picture.shape) for picture in pictures])).encode()),
        pixels=[value for picture in pictures for value in _sampled(picture)],
        positions=config.get_text_config().max_position_embeddings,
    )  # fmt: skip


def _sampled(picture: torch.Tensor) -> list[float]:
    places = torch.linspace(0, picture.numel() - 1, SAMPLED, dtype=torch.float64).long()
    return [round(value, 4) for value in picture.flatten()[places].tolist()]


def _gradients() -> Image.Image:
    """A large picture, no two places of it alike."""
    gray = Image.linear_gradient("L")
    turned = (gray, gray.rotate(90), gray.rotate(180))
    return Image.merge("RGB", [channel.resize(LARGE) for channel in turned])


def check_image(folder: Path, config: Any, processor: Any, inputs: dict[str, Any]) -> None:
    """The picture has one place in the prompt, as long as what the model makes of it. Raises InputError."""
    if (token := processor.image_token_id) != config.image_token_id:
        raise _refused(folder, f"config.json's image_token_id is {config.image_token_id}, its processor's {token}")
    runs = [len(list(run)) for each, run in groupby(inputs["input_ids"][0].tolist()) if each == token]
    if len(runs) != 1:
        raise _refused(folder, f"its chat template gives a picture {len(runs)} places in the prompt, expected one")
    if runs[0] != (made := family_of(config.model_type).count_image_tokens(config, inputs)):
        raise _refused(
            folder, f"its processor gives a picture of {SIDE} x {SIDE} pixels {runs[0]} tokens, the model that "
            f"config.json describes {made}: their patch and merge sizes must be the same",
        )  # fmt: skip


def check_generation(folder: Path, words: int) -> None:
    """The engine reads from generation_config.json, where there is one, what ends a response. Raises InputError."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return
    try:
        found = GenerationConfig.from_pretrained(folder).eos_token_id
    except Exception as error:  # transformers raises many kinds
        raise _refused(folder, f"its generation_config.json cannot be read ({_said(error)})") from error
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if strange := [end for end in ends if type(end) is not int or not 0 <= end < words]:
        raise _refused(
            folder, f"its generation_config.json ends responses with the token {strange[0]!r:.50}, "
            f"expected numbers below {words}",
        )  # fmt: skip


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise _refused(folder, f"its config.json cannot be loaded ({_said(error)})") from error


def _processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise _refused(
            folder, f"its processor cannot be loaded from processor_config.json or preprocessor_config.json "
            f"({_said(error)})",
        ) from error  # fmt: skip
    if not hasattr(processor, "image_processor"):
        raise _refused(folder, "expected processor_config.json or preprocessor_config.json, found no image processor")
    return processor


def _inputs(folder: Path, processor: Any, picture: Image.Image) -> dict[str, Any]:
    try:
        chat(processor, QUESTION)
    except Exception as error:
        raise _refused(folder, f"its chat template cannot be used ({_said(error)})") from error
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    try:
        return model_inputs(processor, QUESTION, buffer.getvalue())
    except Exception as error:
        raise _refused(
            folder, f"its processor and chat template make no prompt of a picture and a question ({_said(error)})"
        ) from error


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:SAID]


def _refused(folder: Path, what: str) -> InputError:
    return InputError(f"model {folder}: {what}; take its files as they were published, or fetch the model again")
