"""`python -m benchmarks scale`: time and peak memory of each stage at 250, 1,000 and 4,000 training questions.

The only baseline is the smallest run. For time it is multiplied by the growth in questions: a ratio of at least 1 is no
worse than linear. For memory it is used as it is: a ratio of 1 means bounded memory. Memory adds the peaks of the
flow's process and of the largest processes that a stage runs at once.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import pipeline
from benchmarks.measure import Row, make_row


@dataclass(frozen=True)
class Sizes:
    """Training questions of each run, the smallest first; evaluation questions of all."""

    questions: tuple[int, ...] = (250, 1000, 4000)
    evaluation: int = 500


def measure(sizes: Sizes = Sizes()) -> list[Row]:
    runs = {}
    for questions in sizes.questions:
        with TemporaryDirectory(prefix="masters-bench-") as folder:
            limits = dict(data__train_limit=questions, data__eval_limit=sizes.evaluation)
            summary, seconds = pipeline.run("distill", store__root=Path(folder) / "store", **limits)
        runs[questions] = pipeline.read_stages(summary) | {"whole": dict(seconds=seconds)}
    return make_rows(runs)


def make_rows(runs: dict[int, dict[str, dict]]) -> list[Row]:
    """Return rows of every stage and size, from the summaries' entries by size and stage."""
    rows, smallest = [], min(runs)
    for name, first in runs[smallest].items():
        for questions, stages in runs.items():
            stage, case = stages[name], f"{name}, {questions} questions"
            linear = first["seconds"] * questions / smallest
            rows.append(make_row(f"{case}, time", "s", [stage["seconds"]], [linear]))
            if "peak_mib" in stage:
                rows.append(make_row(f"{case}, memory", "MiB", [_memory(stage)], [_memory(first)]))
    return rows


def _memory(stage: dict) -> float:
    return stage["peak_mib"] + stage.get("children_peak_mib", 0)
