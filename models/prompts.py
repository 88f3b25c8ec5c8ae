"""Prompts of questions: the chat template over one user turn with the image and then the text, nothing added.

Prompt lengths are counted without making image tensors: the text is tokenized, and the number of image tokens comes
from the processor's own arithmetic on the image size, which transformers keeps for vLLM.

Shapes: P prompt tokens.
"""

import io
from contextlib import suppress

import torch
from jinja2 import TemplateError
from PIL import Image

from masters.data.images import to_rgb
from masters.rewards.judge_prompts import TAGS, Conversation, merge_system_turn


def open_image(image: bytes) -> Image.Image:
    """Decode an image file to RGB."""
    return to_rgb(Image.open(io.BytesIO(image)))


def chat_prompt(processor, question: str) -> str:
    """Return the prompt's text, which holds one image token."""
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    return processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)


def tokenize_conversation(processor, tokenizer, conversation: Conversation) -> list[int] | None:
    """Return a conversation's token ids up to the model's next turn; None if quoted text holds a control token.

    Tags separate quoted text from instructions only if it cannot end its turn or begin another.
    """
    ids = _tokenize_turns(processor, tokenizer, conversation)
    without_quotes = [turn | {"content": "".join(TAGS.findall(turn["content"]))} for turn in conversation]
    control = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    found, expected = (
        sum(token in control for token in tokens)
        for tokens in (ids, _tokenize_turns(processor, tokenizer, without_quotes))
    )
    return ids if found == expected else None


def _tokenize_turns(processor, tokenizer, conversation: Conversation) -> list[int]:
    return tokenizer(render_conversation(processor, conversation), add_special_tokens=False)["input_ids"]


def render_conversation(processor, conversation: Conversation) -> str:
    """Return a conversation's text; a system turn that the template refuses or leaves out begins the user's turn."""
    with suppress(TemplateError):
        text = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        if conversation[0]["content"] in text:
            return text
    merged = merge_system_turn(conversation)
    return processor.apply_chat_template(merged, tokenize=False, add_generation_prompt=True)


def vocabulary_size(tokenizer) -> int:
    """Return the number of token ids up to the tokenizer's last; embedding rows beyond it stand for no token."""
    return 1 + max(tokenizer.get_vocab().values())


def tokenize_label(tokenizer, answer: str) -> list[int]:
    """Return the token ids of a reference answer, followed by the end token."""
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def model_inputs(processor, question: str, image: bytes) -> dict[str, torch.Tensor]:
    """Return the processor's output: token tensors [1, P] and the family's image tensors."""
    return dict(processor(text=[chat_prompt(processor, question)], images=[open_image(image)], return_tensors="pt"))


class PromptLengthCounter:
    """Counts a prompt's tokens exactly as the processor does.

    The processor runs once, to learn how many tokens it writes around an image.
    """

    def __init__(self, processor) -> None:
        self._processor, self._tokens_around_image = processor, 0  # 0 while the next lines measure it
        image, text = Image.new("RGB", (64, 64)), chat_prompt(processor, "?")
        exact = len(processor(text=[text], images=[image])["input_ids"][0])
        self._tokens_around_image = exact - self(text, image.size)

    def __call__(self, text: str, size: tuple[int, int]) -> int:
        """Return the tokens of a `chat_prompt` with an image. `size`: the image's width and height in pixels."""
        width, height = size
        image_tokens = self._processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"][0]
        text_tokens = len(self._processor.tokenizer(text, verbose=False)["input_ids"])  # no warning of long texts
        return text_tokens + image_tokens + self._tokens_around_image
