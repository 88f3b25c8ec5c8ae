"""Accuracy on a demo task's test split with plain transformers: `python -m demo.evaluate TASK FOLDER`.

Independent of the pipeline: generates greedily and compares with its own rule (equal after trimming, ignoring case;
of answers in steps what follows the last "="; of captions what `demo.wordings` reads in them). It shares nothing with
`masters` but the drawn scenes of `digits` and `captions`, so that the two can check each other.
"""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO

import easy_vqa
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from demo.wordings import describes
from masters.data.sources.base import RawRow
from masters.data.sources.captions import CaptionsSource
from masters.data.sources.digits import DigitsSource

BATCH = 64
TOKENS = 32  # at most, of an answer


@dataclass(frozen=True)
class Test:
    """A test split: questions, reference answers, images, which questions share an image, and when an answer is right.

    `is_right` takes an answer and its reference.
    """

    questions: list[str]
    references: list[str]
    images: list[str | BytesIO]
    clusters: list[object]
    is_right: Callable[[str, str], bool]


def drawn(every: Iterable[RawRow], is_right: Callable[[str, str], bool]) -> Test:
    rows = [row for row in every if row.split == "test"]
    return Test(
        [str(row.question) for row in rows], [str(row.answer) for row in rows],
        [BytesIO(row.image) for row in rows if isinstance(row.image, bytes)], [row.image for row in rows], is_right,
    )  # fmt: skip


def easyvqa() -> Test:
    questions, references, numbers = easy_vqa.get_test_questions()
    paths = easy_vqa.get_test_image_paths()
    return Test(questions, references, [paths[number] for number in numbers], numbers, same_end)


def same_end(answer: str, reference: str) -> bool:
    return answer.split("=")[-1].strip().lower() == reference.strip().lower()


TASKS: dict[str, Callable[[], Test]] = {
    "digits": lambda: drawn(DigitsSource().rows(), same_end),
    "captions": lambda: drawn(CaptionsSource().rows(), describes),
    "easyvqa": easyvqa,
}


@torch.inference_mode()
def answers(folder: str, questions: list[str], images: list[str | BytesIO]) -> Iterator[str]:
    """Yield greedy answers in order. Questions are batched in order and padded on the left."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    for at in range(0, len(questions), BATCH):
        turns = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            for question in questions[at : at + BATCH]
        ]
        texts = [processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
        opened = [[Image.open(image).convert("RGB")] for image in images[at : at + BATCH]]
        inputs = processor(text=texts, images=opened, padding=True, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        yield from processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def standard_error(right: list[bool], clusters: list[object]) -> float:
    """Return the standard error of the share of right answers, clustered by image."""
    share, sums = sum(right) / len(right), Counter()
    for hit, cluster in zip(right, clusters, strict=True):
        sums[cluster] += hit - share
    return math.sqrt(sum(value**2 for value in sums.values()) * len(sums) / (len(sums) - 1)) / len(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("folder")
    given = parser.parse_args()
    test = TASKS[given.task]()
    said = answers(given.folder, test.questions, test.images)
    pairs = zip(said, test.references, strict=True)
    right = [test.is_right(answer, reference) for answer, reference in pairs]
    error = standard_error(right, test.clusters)
    print(f"accuracy {sum(right) / len(right):.2%} (standard error {error:.2%}), {len(right):,} questions")


if __name__ == "__main__":
    main()
