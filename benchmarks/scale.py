"""`python -m benchmarks scale`: time and peak memory of each stage at 250, 1,000 and 4,000 training questions.

There is nothing to compare with but the smallest run. Of time the baseline is the smallest run's, multiplied as the
questions are: a ratio of 1 and more is no worse than linear. Of memory it is the smallest run's itself: 1 is bounded.
Memory is what the flow's process and the largest processes that a stage runs at once held at their peaks, together.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import pipeline
from benchmarks.measure import Row, once


@dataclass(frozen=True)
class Sizes:
    """Training questions of each run, the smallest first; evaluation questions of all."""

    questions: tuple[int, ...] = (250, 1000, 4000)
    evaluation: int = 500


def measured(sizes: Sizes = Sizes()) -> list[Row]:
    runs = {}
    for questions in sizes.questions:
        with TemporaryDirectory(prefix="masters-bench-") as work:
            limits = dict(data__train_limit=questions, data__eval_limit=sizes.evaluation)
            summary, whole = pipeline.run("distill", store__root=Path(work) / "store", **limits)
        runs[questions] = pipeline.stages(summary) | {"whole": dict(seconds=whole)}
    return rows(runs)


def rows(runs: dict[int, dict[str, dict]]) -> list[Row]:
    """Rows of every stage and size, from what the summaries say by size and stage."""
    found, smallest = [], min(runs)
    for name, first in runs[smallest].items():
        for questions, stages in runs.items():
            at, case = stages[name], f"{name}, {questions} questions"
            linear = first["seconds"] * questions / smallest
            found.append(once(f"{case}, time", "s", at["seconds"], linear))
            if "peak_mib" in at:
                found.append(once(f"{case}, memory", "MiB", memory(at), memory(first)))
    return found


def memory(stage: dict) -> float:
    return stage["peak_mib"] + stage.get("children_peak_mib", 0)
