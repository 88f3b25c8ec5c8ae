"""`python -m benchmarks end-to-end`: the demo's generate and train, against the same method in one plain script.

Ours is `masters stage train`, everything in it (Prefect, MLflow, tables, checkpoints); the baseline is
`examples/straightforward.py`. Each is a fresh process with an empty folder, on the same questions. Evaluation is left
out: of the evaluation split ours gets the one question that it insists on.
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
from benchmarks.measure import Row, medians
from examples.straightforward import Settings
from masters.common.errors import MastersError
from masters.config import Config
from masters.config.loading import load
from masters.config.mask_schedule import mask_stages
from masters.data.sources.easyvqa import EasyVqa

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
    """Wall time of the whole, and of it up to the last response's verdict and from there on; what all processes
    together computed; steps of training."""

    whole: float
    generate: float
    train: float
    cpu: float
    steps: int


def measured(sizes: Sizes = Sizes()) -> list[Row]:
    """Rows of the whole and of its two parts (what is in neither is starting and ending), and of CPU time."""
    with TemporaryDirectory(prefix="masters-bench-") as work:
        folder = Path(work)
        train, both = write_questions(folder, sizes.questions)
        turns = [
            (masters(both, folder / f"store-{n}", sizes), straightforward(train, folder / f"plain-{n}", sizes))
            for n in range(sizes.repeats)
        ]
    ours, plain = zip(*turns, strict=True)
    case = f"{sizes.questions} questions, {ours[0].steps} steps (baseline {plain[0].steps})"
    return [
        medians(f"{case}, {part}", "s", [getattr(one, part) for one in ours], [getattr(one, part) for one in plain])
        for part in PARTS
    ]


def write_questions(folder: Path, count: int) -> tuple[Path, Path]:
    """The first training questions of easy-VQA as JSONL; and these with a question for evaluation."""
    first = [row for row in EasyVqa().rows() if row.split == "train"][:count]
    other = next(row for row in EasyVqa().rows() if row.split == "test")
    lines = []
    for row in [*first, other]:
        image = f"{row.split}/{row.image}"
        (folder / image).parent.mkdir(exist_ok=True)
        (folder / image).write_bytes(Path(f"{row.root}/{row.image}").read_bytes())
        lines.append(dict(id=row.id, image=image, question=row.question, answer=row.answer, split=row.split))
    train, both = folder / "train.jsonl", folder / "both.jsonl"
    for file, rows in ((train, lines[:-1]), (both, lines)):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return train, both


def masters(questions: Path, store: Path, sizes: Sizes) -> Seconds:
    before = children_cpu()
    summary, whole = pipeline.run(
        "stage", "train", data__source=questions, store__root=store, teachers__0__r_max=sizes.r_max
    )
    stages = pipeline.stages(summary)
    generation = sum(stages[name]["seconds"] for name in GENERATION)
    cpu = children_cpu() - before
    return Seconds(whole, generation, stages["train"]["seconds"], cpu, stages["train"]["steps"])


def straightforward(questions: Path, out: Path, sizes: Sizes) -> Seconds:
    out.mkdir()
    job = out / "job.json"
    job.write_text(json.dumps(asdict(settings(load(pipeline.CONFIG), questions, out, sizes))))
    began, before = time.monotonic(), children_cpu()
    done = subprocess.run(
        [sys.executable, "-m", "examples.straightforward", str(job)],
        cwd=pipeline.ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},  # as ours: no step stands still for a neighbor on a core
    )  # fmt: skip
    whole, cpu = time.monotonic() - began, children_cpu() - before
    if done.returncode:
        raise MastersError(f"the plain script ended with exit code {done.returncode}: {done.stderr[-500:]}")
    report = json.loads((out / "report.json").read_text())
    seconds = report["seconds"]
    return Seconds(whole, seconds["mask"] + seconds["generate"], seconds["train"], cpu, len(report["losses"]))


def children_cpu() -> float:
    """Seconds of all processes that ended below this one: other than wall time, hardly a neighbor's doing."""
    used = getrusage(RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def settings(config: Config, questions: Path, out: Path, sizes: Sizes) -> Settings:
    """The demo's configuration for the plain script."""
    generate, train, teacher = config.generate, config.train, config.teachers[0]
    return Settings(
        questions=str(questions), teacher=teacher.model, student=config.student.model, out=str(out),
        ratios=mask_stages(sizes.r_max, teacher.mask_step), samples=generate.teacher_responses,
        sampling={name: getattr(generate, name) for name in SAMPLING}, max_model_len=config.runtime.max_model_len,
        learning_rate=train.learning_rate, beta=train.beta, epochs=train.epochs,
        questions_per_step=train.questions_per_step, seed=train.seed,
    )  # fmt: skip
