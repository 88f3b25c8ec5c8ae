"""Exact match on easy-VQA's official test split with plain transformers: `python -m demo.evaluate FOLDER`.

Independent of the pipeline: reads the package's questions, generates greedily, and compares with its own rule
(equal after trimming, ignoring case). It shares nothing with `masters`, so that the two can check each other.
"""

import argparse
import math
from collections.abc import Iterator

import easy_vqa
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

BATCH = 64


@torch.inference_mode()
def answers(folder: str, questions: list[str], images: list[str]) -> Iterator[str]:
    """Greedy answers, in order; questions are batched as they come, padded on the left."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    for at in range(0, len(questions), BATCH):
        turns = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            for question in questions[at : at + BATCH]
        ]
        texts = [processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
        opened = [[Image.open(path).convert("RGB")] for path in images[at : at + BATCH]]
        inputs = processor(text=texts, images=opened, padding=True, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        yield from processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    questions, references, image_ids = easy_vqa.get_test_questions()
    paths = easy_vqa.get_test_image_paths()
    said = answers(parser.parse_args().folder, questions, [paths[i] for i in image_ids])
    right = sum(a.strip().lower() == r.strip().lower() for a, r in zip(said, references, strict=True))
    share = right / len(questions)
    error = math.sqrt(share * (1 - share) / len(questions))
    print(f"exact match {share:.2%} (standard error {error:.2%}), {len(questions):,} questions")


if __name__ == "__main__":
    main()
