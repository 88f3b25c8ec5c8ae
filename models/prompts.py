"""A question as models see it: the chat template over one user turn, the image, then the text, nothing added.

How many tokens a prompt has with its image expanded is counted without making the image's tensors: the text is
tokenized, the image's tokens come from the processor's own arithmetic on its size, which transformers keeps for vLLM.
"""

import io

import torch
from PIL import Image

from masters.data.images import rgb
from masters.rewards.judge_prompts import TAGS, Conversation


def opened(image: bytes) -> Image.Image:
    return rgb(Image.open(io.BytesIO(image)))


def chat(processor, question: str) -> str:
    """The prompt's text, one image token in it."""
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    return processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)


def conversation_tokens(processor, tokenizer, conversation: Conversation) -> list[int] | None:
    """A conversation's tokens up to where the model goes on; None where what it quotes holds a control token.

    Tags keep quoted text in its place only as long as it cannot end the turn or begin another.
    """
    ids = _rendered(processor, tokenizer, conversation)
    bare = [turn | {"content": "".join(TAGS.findall(turn["content"]))} for turn in conversation]
    control = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ours, expected = (sum(token in control for token in of) for of in (ids, _rendered(processor, tokenizer, bare)))
    return ids if ours == expected else None


def _rendered(processor, tokenizer, conversation: Conversation) -> list[int]:
    text = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def label_tokens(tokenizer, answer: str) -> list[int]:
    """A label's tokens with the end token."""
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def model_inputs(processor, question: str, image: bytes) -> dict[str, torch.Tensor]:
    """The processor's output: [1, P] token tensors and the family's image tensors."""
    return dict(processor(text=[chat(processor, question)], images=[opened(image)], return_tensors="pt"))


class PromptLength:
    """Counts as the processor it is given does, to the token; it is asked once, for what it writes around an image."""

    def __init__(self, processor) -> None:
        self._processor, self._around = processor, 0
        image, text = Image.new("RGB", (64, 64)), chat(processor, "?")
        real = len(processor(text=[text], images=[image])["input_ids"][0])
        self._around = real - self(text, image.size)

    def __call__(self, text: str, size: tuple[int, int]) -> int:
        """`text`: of the chat template, one image in it; `size`: the image's width and height in pixels."""
        width, height = size
        counted = self._processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
        words = len(self._processor.tokenizer(text)["input_ids"])
        return words + counted["num_image_tokens"][0] + self._around
