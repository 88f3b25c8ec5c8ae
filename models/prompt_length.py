"""How many tokens a prompt has with its image expanded, without making the image's tensors: the text is tokenised, the
image's tokens come from the processor's own arithmetic on its size, which transformers keeps for vLLM.
"""

from PIL import Image

from masters.models.prompts import chat


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
