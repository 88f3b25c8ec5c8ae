"""Every family goes through the whole pipeline, with tiny random models and drawn images of several sizes."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo import families, shapes
from tests.command_line import masters, options, read_json, rows
from tests.parity.answers import from_transformers, from_vllm
from tests.shape_data import QUESTIONS, write_rows

STAGES = ["data", "mask", "generate", "score", "train", "evaluate", "register"]
SIDES = [(64, 64), (120, 60), (56, 180)]
# the demo is a Qwen3-VL; students are tied and untied in turn, as small and larger ones of the families are
CASES = [(name, number % 2 == 0) for number, name in enumerate(n for n in families.NAMES if n != "qwen3_vl")]
PADDING = 64  # rows of the teacher's embedding matrix that the student's lacks, as Qwen2.5-VL-72B has beside the 3B


def write_data(folder: Path, count: int) -> Path:
    """Write questions about shapes on images of several sizes; a fourth of them are test questions."""
    rng, rows = np.random.default_rng(11), []
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        image, shape, color = shapes.draw(rng)
        image.resize(SIDES[number % len(SIDES)]).save(folder / "images" / f"{number}.png")
        question = QUESTIONS[number % 3]
        answer, split = shapes.answer_for(question, shape, color), "test" if number % 4 == 0 else "train"
        rows.append(dict(id=f"q{number}", image=f"images/{number}.png", question=question, answer=answer, split=split))
    return write_rows(folder, rows)


def distill(place: Path, source: Path, teacher: Path, student: Path, prefect: dict[str, str]) -> dict:
    """Run `masters distill` with a home of its own and return the summary."""
    values = {
        "store.root": place / "store",
        "data.source": source,
        "student.model": student,
        "teachers.0.model": teacher,
        "teachers.0.mask_step": 0.1,
        "generate.responses": 4,
        "generate.max_tokens": 6,
        "generate.truncated": "keep",
        "train.balance": "sum",  # no answer of random weights is right, and the preset distills from right ones only
        "train.epochs": 1,
        "train.questions_per_step": 4,
        "train.learning_rate": 1e-3,
        "runtime.max_model_len": 128,
        "runtime.train_processes": 1,
    }
    (place / "home").mkdir()
    done = masters("distill", "configs/easyvqa.toml", *options(values), "--json", home=place / "home", **prefect)
    return read_json(done)


def rows_of_embedding(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tied"), CASES)
def test_a_family_goes_through_the_pipeline(name: str, tied: bool, tmp_path: Path, prefect: dict[str, str]) -> None:
    texts = [*QUESTIONS, *shapes.SHAPES, *shapes.COLORS, "yes", "no"]
    teacher = families.save(name, tmp_path / "teacher", texts, "teacher", False, PADDING)
    student = families.save(name, tmp_path / "student", texts, "student", tied, seed=1)
    summary = distill(tmp_path, write_data(tmp_path / "data", 24), teacher, student, prefect)

    assert [(s["name"], s["outcome"]) for s in summary["stages"]] == [(stage, "built") for stage in STAGES]
    responses = rows(summary, "generate", "responses")
    assert len(responses) == 18 * 4
    assert len({r["mask_ratio"] for r in responses if r["source"] == "teacher"}) == 3  # three masks, one engine
    assert len({len(r["prompt_token_ids"]) for r in responses}) >= 3  # images of several lengths
    assert max(max(r["response_token_ids"]) for r in responses) < rows_of_embedding(student)
    assert rows_of_embedding(teacher) == rows_of_embedding(student) + PADDING
    after = Path(summary["student"]["after"]["uri"])
    test_questions = [(r["image"], r["question"]) for r in rows(summary, "data", "questions") if r["split"] == "test"]
    assert len({Image.open(io.BytesIO(image)).size for image, _ in test_questions}) > 1
    trained = from_transformers(after, [{}], test_questions)
    assert from_vllm(after, [{}], test_questions) == trained
    assert trained != from_transformers(student, [{}], test_questions)  # training moved it
