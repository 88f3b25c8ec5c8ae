"""A question as models see it: the chat template over one user turn, the image, then the text, nothing added."""

import io

import torch
from PIL import Image

from masters.images import rgb


def opened(image: bytes) -> Image.Image:
    return rgb(Image.open(io.BytesIO(image)))


def chat(processor, question: str) -> str:
    """The prompt's text, one image token in it."""
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    return processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)


def label_tokens(tokenizer, answer: str) -> list[int]:
    """A label's tokens with the end token."""
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def model_inputs(processor, question: str, image: bytes) -> dict[str, torch.Tensor]:
    """The processor's output: [1, P] token tensors and the family's image tensors."""
    return dict(processor(text=[chat(processor, question)], images=[opened(image)], return_tensors="pt"))
