"""A look at a few rows before a run: fast paths against plain ones, and vLLM against transformers (`--parity`)."""

import tempfile
from itertools import islice
from pathlib import Path

from masters.checks.model_folder import LocalModel
from masters.checks.preflight import Resources
from masters.common.errors import InputError
from masters.config import Config
from masters.data.validation import RejectedRow, validate_rows
from masters.execution import processes

ROWS = 4


def compare_models(config: Config, resources: Resources) -> list[dict]:
    """Differences found for every model: `name`, `found`, `limit`. Loads each model on this machine, twice."""
    rows = [
        dict(question=row["question"], answer=row["answer"], image=row["image"].hex())
        for row in sample_questions(config, resources, ROWS)
    ]
    models = [_model(config, resources.student, [0.0])]
    models += [
        _model(config, model, [teacher.r_max, 0.0])
        for teacher, model in zip(config.teachers, resources.teachers, strict=True)
    ]
    found: list[dict] = []
    with tempfile.TemporaryDirectory(prefix="masters-check-") as folder:
        # a process a model: it holds one engine
        children = [
            processes.Child(
                f"check-{number}", "masters.checks.parity_worker",
                dict(model=model, rows=rows, dtype=config.generate.dtype, runtime=config.runtime.model_dump()),
                Path(folder), {},
            )
            for number, model in enumerate(models)
        ]  # fmt: skip
        processes.run(children, 1, lambda _, line: found.append(line))
    return found


def sample_questions(config: Config, resources: Resources, rows: int) -> list[dict]:
    """The source's first questions. Raises InputError if no row can be used."""
    questions = (row for row in validate_rows(resources.source, resources.special_tokens) if not isinstance(row, RejectedRow))
    found = list(islice(questions, rows))
    if not found:
        raise InputError(f"source {config.data.source} holds no row that could be used")
    return found


def _model(config: Config, model: LocalModel, ratios: list[float]) -> dict:
    from masters.models.masking import group_thresholds, safetensors_tensors

    wanted = sorted(set(ratios), reverse=True)
    rows = group_thresholds(
        lambda: safetensors_tensors(model.folder), wanted, config.mask.granularity, tuple(config.mask.exclude)
    )
    thresholds = {
        str(ratio): {r["tensor"]: r["threshold"] for r in rows if r["mask_ratio"] == ratio and ratio > 0}
        for ratio in wanted
    }
    return dict(name=model.name, folder=str(model.folder), thresholds=thresholds)
