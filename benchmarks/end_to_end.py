"""`python -m benchmarks end-to-end`: the demo's generate and train, against the same method in one plain script.

Ours is `masters stage train`, everything in it (Prefect, MLflow, tables, checkpoints); the baseline is
`examples/straightforward.py`. Each is a fresh process with an empty folder, on the same questions. Evaluation is left
out: ours gets the single evaluation question that it requires.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from tempfile import TemporaryDirectory

from benchmarks import pipeline
from benchmarks.measure import Row, make_row
from examples.straightforward import Settings
from masters.common.errors import MastersError
from masters.config import Config
from masters.config.loading import load
from masters.config.mask_schedule import mask_ratios
from masters.data.sources.easyvqa import EasyVqaSource

SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "max_tokens")
PARTS = ("whole", "generate", "train", "cpu")
GENERATION = ("data", "mask", "generate", "score")


@dataclass(frozen=True)
class Sizes:
    questions: int = 1000
    r_max: float = 0.2
    repeats: int = 3


@dataclass(frozen=True)
class Seconds:
    """Wall seconds of the whole, up to the last response's verdict (`generate`) and from there on (`train`).

    `cpu`: seconds that all processes together computed; `steps`: training steps.
    """

    whole: float
    generate: float
    train: float
    cpu: float
    steps: int


def measure(sizes: Sizes = Sizes()) -> list[Row]:
    """Return rows of the whole, of its two parts (neither holds starting and ending), and of CPU time."""
    with TemporaryDirectory(prefix="masters-bench-") as name:
        folder = Path(name)
        train, train_and_test = write_questions(folder, sizes.questions)
        runs = [
            (
                run_masters(train_and_test, folder / f"store-{n}", sizes),
                run_straightforward(train, folder / f"plain-{n}", sizes),
            )
            for n in range(sizes.repeats)
        ]
    ours, baseline = zip(*runs, strict=True)
    case = f"{sizes.questions} questions, {ours[0].steps} steps (baseline {baseline[0].steps})"
    return [
        make_row(f"{case}, {part}", "s", [getattr(run, part) for run in ours], [getattr(run, part) for run in baseline])
        for part in PARTS
    ]


def write_questions(folder: Path, count: int) -> tuple[Path, Path]:
    """Write the first training questions of easy-VQA as JSONL, and the same with one test question."""
    train_rows = [row for row in EasyVqaSource().rows() if row.split == "train"][:count]
    test_row = next(row for row in EasyVqaSource().rows() if row.split == "test")
    lines = []
    for row in [*train_rows, test_row]:
        image = f"{row.split}/{row.image}"
        (folder / image).parent.mkdir(exist_ok=True)
        (folder / image).write_bytes(Path(f"{row.root}/{row.image}").read_bytes())
        lines.append(dict(id=row.id, image=image, question=row.question, answer=row.answer, split=row.split))
    train, train_and_test = folder / "train.jsonl", folder / "both.jsonl"
    for file, rows in ((train, lines[:-1]), (train_and_test, lines)):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return train, train_and_test


def run_masters(questions: Path, store: Path, sizes: Sizes) -> Seconds:
    cpu_before = children_cpu_seconds()
    summary, whole = pipeline.run(
        "stage",
        "train",
        preset="paper",
        generate__truncated="mask",  # as the script does
        data__source=questions,
        store__root=store,
        teachers__0__r_max=sizes.r_max,
    )
    stages = pipeline.read_stages(summary)
    generation = sum(stages[name]["seconds"] for name in GENERATION)
    cpu = children_cpu_seconds() - cpu_before
    return Seconds(whole, generation, stages["train"]["seconds"], cpu, stages["train"]["steps"])


def run_straightforward(questions: Path, out: Path, sizes: Sizes) -> Seconds:
    out.mkdir()
    job = out / "job.json"
    job.write_text(json.dumps(asdict(make_settings(load(pipeline.CONFIG), questions, out, sizes))))
    start, cpu_before = time.monotonic(), children_cpu_seconds()
    process = subprocess.run(
        [sys.executable, "-m", "examples.straightforward", str(job)],
        cwd=pipeline.ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},  # as ours, so that a neighbor on a core stalls no step
    )
    whole, cpu = time.monotonic() - start, children_cpu_seconds() - cpu_before
    if process.returncode:
        raise MastersError(f"the plain script ended with exit code {process.returncode}: {process.stderr[-500:]}")
    report = json.loads((out / "report.json").read_text())
    seconds = report["seconds"]
    return Seconds(whole, seconds["mask"] + seconds["generate"], seconds["train"], cpu, len(report["losses"]))


def children_cpu_seconds() -> float:
    """Return CPU seconds of all child processes that ended. Unlike wall time, neighbors hardly change them."""
    usage = getrusage(RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def make_settings(config: Config, questions: Path, out: Path, sizes: Sizes) -> Settings:
    """Return the demo's configuration as settings of the plain script."""
    generate, train, teacher = config.generate, config.train, config.teachers[0]
    return Settings(
        questions=str(questions),
        teacher=teacher.model,
        student=config.student.model,
        out=str(out),
        ratios=mask_ratios(sizes.r_max, teacher.mask_step),
        samples=generate.teacher_responses,
        sampling={name: getattr(generate, name) for name in SAMPLING},
        max_model_len=config.runtime.max_model_len,
        learning_rate=train.learning_rate,
        beta=train.beta,
        epochs=train.epochs,
        questions_per_step=train.questions_per_step,
        seed=train.seed,
    )
