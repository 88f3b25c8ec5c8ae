"""Parity check (`masters check --parity`) on a few rows: fast code against plain code, vLLM against transformers."""

import base64
import tempfile
from itertools import islice
from pathlib import Path

from masters.checks.estimates import SAMPLED_QUESTIONS, measure_prompts
from masters.checks.model_folder import LocalModel
from masters.checks.parity_job import MAX_TOKENS, Difference, ParityJob, ParityQuestion
from masters.checks.preflight import Resources, shortest_context_length
from masters.common.errors import InputError
from masters.config import Config
from masters.config.mask_schedule import mask_ratios
from masters.data.row_validation import RejectedRow, validate_rows
from masters.execution import processes
from masters.execution.processes import WorkerModule

CHECKED_QUESTIONS = 4


def compare_models(config: Config, resources: Resources) -> list[Difference]:
    """Return the differences measured for every model. Each model is loaded on this machine twice."""
    questions = tuple(
        ParityQuestion(question=row["question"], answer=row["answer"], image=base64.b64encode(row["image"]))
        for row in _select_questions(config, resources)
    )
    ratios = [(resources.student, [0.0])]
    ratios += [
        (model, mask_ratios(teacher.r_max, teacher.mask_step))
        for teacher, model in zip(config.teachers, resources.teachers, strict=True)
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
        raise InputError(
            f"source {config.data.source}: expected valid rows, found none; `masters check` prints the reasons"
        )
    return questions


def _select_questions(config: Config, resources: Resources) -> list[dict]:
    """Return the first questions that an engine takes, as a run skips longer ones. Raises InputError without any."""
    limit = shortest_context_length(config, resources) - MAX_TOKENS
    rows = sample_questions(config, resources, SAMPLED_QUESTIONS)
    prompts = measure_prompts(resources.student.folder, rows)
    fitting = [row for row, (tokens, _) in zip(rows, prompts, strict=True) if tokens <= limit]
    if not fitting:
        raise InputError(
            f"source {config.data.source}: each of the first {len(rows)} prompts takes more than the {limit} tokens "
            "that leave room for an answer: raise runtime.max_model_len, shorten the questions or shrink the images"
        )
    return fitting[:CHECKED_QUESTIONS]


def _make_job(
    config: Config, model: LocalModel, ratios: list[float], questions: tuple[ParityQuestion, ...]
) -> ParityJob:
    from masters.models.masking import group_thresholds, iterate_tensors

    thresholds: dict[float, dict[str, float]] = {ratio: {} for ratio in ratios}
    if masked := [ratio for ratio in ratios if ratio > 0]:
        rows = group_thresholds(
            lambda: iterate_tensors(model.folder), masked, config.mask.granularity, tuple(config.mask.exclude)
        )
        for row in rows:
            thresholds[row["mask_ratio"]][row["tensor"]] = row["threshold"]
    return ParityJob(
        name=model.name,
        folder=model.folder,
        thresholds=thresholds,
        questions=questions,
        dtype=config.generate.dtype,
        runtime=config.runtime,
    )
