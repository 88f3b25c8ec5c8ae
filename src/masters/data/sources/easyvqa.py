"""easy-VQA from the `easy_vqa` package: images of 64 x 64 pixels with one shape, in the official splits."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from masters.common.errors import InputError
from masters.common.hashing import folder_digest
from masters.data.sources.base import RawRow

COLORS = frozenset(("red", "green", "blue", "yellow", "brown", "black", "gray", "teal"))
SPLITS = ("train", "test")


class EasyVqaSource:
    """48,248 questions about 5,000 images; the questions of an image follow each other."""

    def __init__(self) -> None:
        # not imported: only its data files are read
        spec = find_spec("easy_vqa")
        if spec is None or not spec.origin:
            raise InputError("source easyvqa: expected the package easy-vqa, found none; run `make setup`")
        self.folder = Path(spec.origin).parent / "data"
        missing = [s for s in SPLITS if not (self.folder / s / "questions.json").is_file()]
        if missing:
            raise InputError(
                f"source easyvqa: expected {missing[0]}/questions.json in {self.folder}, found none; run `make setup`"
            )

    def digest(self) -> str:
        return folder_digest(self.folder, (".json", ".png"))

    def rows(self) -> Iterator[RawRow]:
        for split in SPLITS:
            root = self.folder / split / "images"
            questions = json.loads((self.folder / split / "questions.json").read_bytes())
            for number, (question, answer, image) in enumerate(questions):
                category = question_category(question)
                yield RawRow(f"{split}-{number}", f"{image}.png", question, answer, split, category, root)


def question_category(question: str) -> str:
    """Return what a question asks for by its words: a color or a shape, by name or as yes or no."""
    words = question.rstrip("?").split()
    if words[0] == "what":
        return "color" if "color" in words else "shape"
    return "color-yes-no" if COLORS.intersection(words) else "shape-yes-no"
