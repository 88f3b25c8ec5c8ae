"""Every family through the whole pipeline, as a user runs it: tiny random models, drawn images of several sizes."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from demo import families, shapes
from tests.drawn import QUESTIONS, write_rows
from tests.parity.answers import from_transformers, from_vllm

ROOT = Path(__file__).parents[2]
STAGES = ["data", "mask", "generate", "score", "train", "evaluate", "register"]
SIDES = [(64, 64), (120, 60), (56, 180)]
# family, tied heads, rows of the teacher's embedding that the student's lacks
CASES = {
    "internvl3_5": ("internvl3_5", False, 0),
    "internvl3": ("internvl3", True, 0),
    "qwen2_5_vl": ("qwen2_5_vl", True, 0),
    "qwen2_5_vl, padded": ("qwen2_5_vl", False, 64),
}


def write_data(folder: Path, count: int) -> Path:
    """Questions about shapes on images of several sizes, a fourth of them for the test."""
    rng, rows = np.random.default_rng(11), []
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        image, shape, color = shapes.draw(rng)
        image.resize(SIDES[number % len(SIDES)]).save(folder / "images" / f"{number}.png")
        question = QUESTIONS[number % 3]
        answer, split = shapes.answer_for(question, shape, color), "test" if number % 4 == 0 else "train"
        rows.append(dict(id=f"q{number}", image=f"images/{number}.png", question=question, answer=answer, split=split))
    return write_rows(folder, rows)


def distil(place: Path, source: Path, teacher: Path, student: Path) -> dict:
    """The summary of `masters distill`, with a home of its own."""
    values = {
        "store.root": place / "store", "data.source": source,
        "student.model": student, "teachers.0.model": teacher, "teachers.0.step": 0.1,
        "generate.responses": 4, "generate.max_tokens": 6,
        "train.epochs": 1, "train.questions_per_step": 4, "train.learning_rate": 1e-3,
        "runtime.max_model_len": 128,
    }  # fmt: skip
    (place / "home").mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    options = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    done = subprocess.run(
        [sys.executable, "-m", "masters.cli", "distill", "configs/demo.toml", *options, "--json"],
        cwd=ROOT, env=kept | {"HOME": str(place / "home")}, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def rows(summary: dict, stage: str, table: str) -> list[dict]:
    folder = Path(next(s["uri"] for s in summary["stages"] if s["name"] == stage))
    return [row for file in sorted(folder.glob(f"{table}/*.parquet")) for row in parquet.read_table(file).to_pylist()]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tied", "padding"), CASES.values(), ids=CASES)
def test_a_family_goes_through_the_pipeline(name: str, tied: bool, padding: int, tmp_path: Path) -> None:
    texts = [*QUESTIONS, *shapes.SHAPES, *shapes.COLORS, "yes", "no"]
    teacher = families.save(name, tmp_path / "teacher", texts, "teacher", tied, padding)
    student = families.save(name, tmp_path / "student", texts, "student", tied, seed=1)
    summary = distil(tmp_path, write_data(tmp_path / "data", 24), teacher, student)

    assert [(s["name"], s["outcome"]) for s in summary["stages"]] == [(stage, "built") for stage in STAGES]
    responses = rows(summary, "generate", "responses")
    assert len(responses) == 18 * 4
    assert len({r["mask_ratio"] for r in responses if r["source"] == "teacher"}) == 3  # three masks, one engine
    assert len({len(r["prompt_token_ids"]) for r in responses}) >= 3  # images of several lengths
    after = Path(summary["student"]["after"]["uri"])
    asked = [(r["image"], r["question"]) for r in rows(summary, "data", "questions") if r["split"] == "test"]
    assert len({Image.open(io.BytesIO(image)).size for image, _ in asked}) > 1
    trained = from_transformers(after, [{}], asked)
    assert from_vllm(after, [{}], asked) == trained
    assert trained != from_transformers(student, [{}], asked)  # training moved it
