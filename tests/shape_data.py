"""A user's data for tests: a JSONL of questions about drawn shapes, with image files beside it."""

import json
from pathlib import Path

import numpy as np

from demo import shapes

QUESTIONS = ("what shape is present?", "what color is the shape?", "is there a circle?")


def write_questions(folder: Path, count: int, seed: int = 7, bad: bool = True) -> Path:
    """Write `count` good rows, a quarter of them test rows; with `bad` five more, each with another fault."""
    rng, rows = np.random.default_rng(seed), []
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        image, shape, color = shapes.draw(rng)
        image.save(folder / "images" / f"{number}.png")
        question = QUESTIONS[number % 3]
        answer = shapes.answer_for(question, shape, color)
        split = "test" if number % 4 == 0 else "train"
        rows.append(dict(id=f"q{number}", image=f"images/{number}.png", question=question, answer=answer, split=split))
    return write_rows(folder, [*rows, *(_faults(folder, rows[1]) if bad else [])])


def write_rows(folder: Path, rows: list[dict]) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _faults(folder: Path, good: dict) -> list[dict]:
    (folder / "images" / "broken.png").write_bytes(b"\x89PNG no picture")
    return [
        good | dict(id="missing", image="images/none.png"),
        good | dict(id="broken", image="images/broken.png"),
        good | dict(id="outside", image="../outside.png"),
        good | dict(id="empty", answer=" "),
        good,  # an id that is there already
    ]
