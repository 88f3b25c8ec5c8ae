"""lmms-eval's results as rows of tables. Incomplete results are refused.

lmms-eval 0.7 exits without an error where an evaluation failed, so its results are checked for completeness.
"""

import json
import math
from collections.abc import Iterator

from masters.common.errors import WorkerError

STDERR = "_stderr"
# the fields of a sample that are not metrics
SAMPLE_FIELDS = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "doc_hash", "token_counts"}


def check_complete(benchmark: str, results: dict) -> None:
    """Raises WorkerError unless every task has a score and a sample for each of its documents."""
    sizes = results.get("n-samples") or {}
    if not sizes:
        raise WorkerError(f"benchmark {benchmark}: lmms-eval gave no results")
    for task, size in sizes.items():
        documents = {sample["doc_id"] for sample in results.get("samples", {}).get(task, [])}
        if not documents or len(documents) != size["effective"]:
            raise WorkerError(
                f"benchmark {benchmark}: {task} has samples of {len(documents)} documents, expected {size['effective']}"
            )
        if not any(row["task"] == task for row in score_rows(benchmark, results)):
            raise WorkerError(f"benchmark {benchmark}: lmms-eval gave {task} no score")


def score_rows(benchmark: str, results: dict) -> Iterator[dict]:
    """Yield one row per task, metric and filter, for tasks of a group and for the group's mean.

    Values that are not numbers are left out: lmms-eval lists files for submission as metrics. `standard_error` is None
    where lmms-eval has none. Source: `consolidate_results` in lmms_eval/evaluator_utils.py.
    """
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or STDERR in metric or (number := _number(value)) is None:
                continue
            n = results["n-samples"].get(task, {}).get("effective") or _number(values.get("samples"))
            yield dict(
                benchmark=benchmark,
                task=task,
                version=_version(results, task),
                metric=metric,
                filter=filter_name,
                value=number,
                standard_error=_number(values.get(f"{metric}{STDERR},{filter_name}")),
                n=None if n is None else int(n),
            )


def sample_rows(benchmark: str, results: dict) -> Iterator[dict]:
    """Yield one row per document (and filter, where a task has several)."""
    for task, samples in results["samples"].items():
        for sample in samples:
            scores = {name: value for name, value in sample.items() if name not in SAMPLE_FIELDS}
            yield dict(
                benchmark=benchmark,
                task=task,
                doc_id=sample["doc_id"],
                prompt=_prompt(sample),
                target=_text(sample["target"]),
                response=_text(sample["resps"]),
                filtered=_text(sample["filtered_resps"]),
                scores=json.dumps(scores, ensure_ascii=False),
            )


def metrics_and_tags(model: str, scores: list[dict], lmms_eval_version: str) -> tuple[dict[str, float], dict[str, str]]:
    """Return a model's scores as MLflow metrics `MODEL/TASK/METRIC`, and the versions as tags."""
    metrics, tags = {}, {"benchmark.lmms-eval": lmms_eval_version}
    for row in scores:
        suffix = "" if row["filter"] == "none" else f"/{row['filter']}"
        name = f"{model}/{row['task']}/{row['metric']}{suffix}"
        metrics[name] = row["value"]
        if row["standard_error"] is not None:
            metrics[f"{name}/standard_error"] = row["standard_error"]
        tags[f"benchmark.{row['task']}.version"] = row["version"]
    return metrics, tags


def _prompt(sample: dict) -> str:
    """Return the text of a request: the first string among its arguments."""
    return next((part for part in sample["arguments"] if isinstance(part, str)), "")


def _version(results: dict, task: str) -> str:
    """Return a task's version; "unversioned" if its file states none."""
    version = results.get("versions", {}).get(task)
    if version is None or version == "Yaml":
        metadata = results.get("configs", {}).get(task, {}).get("metadata") or {}
        entries = metadata if isinstance(metadata, list) else [metadata]
        version = next((entry["version"] for entry in entries if isinstance(entry, dict) and "version" in entry), None)
    return "unversioned" if version is None else str(version)


def _text(value: object) -> str:
    """Return a response, which may be nested in lists of one, as text; any other value as JSON."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
