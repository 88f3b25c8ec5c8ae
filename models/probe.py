"""Whether a model's processor and chat template make prompts that trainer and engine can use: a small picture and a
short question are put through them, and what comes out is compared with the model's configuration.
"""

import io
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from masters.errors import InputError
from masters.models.families import family_of
from masters.models.prompts import chat, model_inputs

QUESTION = "what shape is it?"
SIDE = 64  # pixels of the picture
SAID = 300  # characters of a library's complaint


@dataclass(frozen=True)
class Probed:
    """Tokens of the small prompt, and how many positions the model knows."""

    prompt: int
    positions: int


def probe(folder: Path) -> Probed:
    """For models of our families. Raises InputError with what does not fit, and where it is written."""
    config, processor = _config(folder), _processor(folder)
    inputs = _inputs(folder, processor)
    ids, words = inputs["input_ids"][0].tolist(), config.get_text_config().vocab_size
    check_image(folder, config, processor, inputs)
    said = processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if said.count(QUESTION) != 1:
        raise _refused(folder, f"its chat template writes the question {said.count(QUESTION)} times, expected once")
    if (largest := max(processor.tokenizer.get_vocab().values())) >= words:
        raise _refused(folder, f"its tokenizer has a token {largest}, config.json a vocabulary of {words}")
    check_generation(folder, words)
    return Probed(len(ids), config.get_text_config().max_position_embeddings)


def check_image(folder: Path, config: Any, processor: Any, inputs: dict[str, Any]) -> None:
    """The picture has one place in the prompt, as long as what the model makes of it. Raises InputError."""
    if (token := processor.image_token_id) != config.image_token_id:
        raise _refused(folder, f"config.json's image_token_id is {config.image_token_id}, its processor's {token}")
    runs = [len(list(run)) for each, run in groupby(inputs["input_ids"][0].tolist()) if each == token]
    if len(runs) != 1:
        raise _refused(folder, f"its chat template gives a picture {len(runs)} places in the prompt, expected one")
    if runs[0] != (made := family_of(config.model_type).image_tokens(config, inputs)):
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


def _inputs(folder: Path, processor: Any) -> dict[str, Any]:
    try:
        chat(processor, QUESTION)
    except Exception as error:
        raise _refused(folder, f"its chat template cannot be used ({_said(error)})") from error
    buffer = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (200, 30, 30)).save(buffer, "PNG")
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
