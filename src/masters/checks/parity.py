"""Parity check (`masters check --parity`) on a few rows: fast code against plain code, vLLM against transformers."""

import base64
import tempfile
from itertools import islice
from pathlib import Path

from masters.checks.model_folder import LocalModel
from masters.checks.parity_job import Difference, ParityJob, ParityQuestion
from masters.checks.preflight import Resources
from masters.common.errors import InputError
from masters.config import Config
from masters.data.validation import RejectedRow, validate_rows
from masters.execution import processes
from masters.execution.processes import WorkerModule

CHECKED_QUESTIONS = 4


def compare_models(config: Config, resources: Resources) -> list[Difference]:
    """Return the differences measured for every model. Each model is loaded on this machine twice."""
    questions = tuple(
        ParityQuestion(question=row["question"], answer=row["answer"], image=base64.b64encode(row["image"]))
        for row in sample_questions(config, resources, CHECKED_QUESTIONS)
    )
    ratios = [(resources.student, {0.0})]
    ratios += [
        (model, {teacher.r_max, 0.0}) for teacher, model in zip(config.teachers, resources.teachers, strict=True)
    ]
    jobs = [_make_job(config, model, model_ratios, questions) for model, model_ratios in ratios]
    differences: list[Difference] = []
    with tempfile.TemporaryDirectory(prefix="masters-check-") as folder:
        # one process per model, because a process can hold only one engine
        children = [
            processes.Child(f"check-{number}", WorkerModule.PARITY, job, Path(folder))
            for number, job in enumerate(jobs)
        ]
        processes.run(children, 1, lambda _, line: differences.append(Difference.model_validate(line)))
    return differences


def sample_questions(config: Config, resources: Resources, count: int) -> list[dict]:
    """Return the source's first valid questions. Raises InputError if there are none."""
    rows = validate_rows(resources.source, resources.special_tokens)
    questions = list(islice((row for row in rows if not isinstance(row, RejectedRow)), count))
    if not questions:
        raise InputError(f"source {config.data.source} contains no valid row")
    return questions


def _make_job(
    config: Config, model: LocalModel, ratios: set[float], questions: tuple[ParityQuestion, ...]
) -> ParityJob:
    from masters.models.masking import group_thresholds, iterate_tensors

    ordered = sorted(ratios, reverse=True)
    rows = group_thresholds(
        lambda: iterate_tensors(model.folder), ordered, config.mask.granularity, tuple(config.mask.exclude)
    )
    thresholds = {
        ratio: {row["tensor"]: row["threshold"] for row in rows if row["mask_ratio"] == ratio and ratio > 0}
        for ratio in ordered
    }
    return ParityJob(
        name=model.name,
        folder=model.folder,
        thresholds=thresholds,
        questions=questions,
        dtype=config.generate.dtype,
        runtime=config.runtime,
    )
