"""What lmms-eval found out, as rows of tables; results that are not whole are refused.

lmms-eval 0.7 ends without an error where an evaluation failed, so what came back is held to what was asked for.
"""

import json
import math
from collections.abc import Iterator

from masters.common.errors import WorkerError

STDERR = "_stderr"
# beside a sample's metrics
SAMPLE_FIELDS = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "doc_hash", "token_counts"}


def check_whole(benchmark: str, results: dict) -> None:
    """Raises WorkerError unless every task has a score and a sample for each of its documents."""
    sizes = results.get("n-samples") or {}
    if not sizes:
        raise WorkerError(f"benchmark {benchmark}: lmms-eval gave no results")
    for task, size in sizes.items():
        answered = {sample["doc_id"] for sample in results.get("samples", {}).get(task, [])}
        if not answered or len(answered) != size["effective"]:
            raise WorkerError(
                f"benchmark {benchmark}: {task} has samples of {len(answered)} documents, expected {size['effective']}"
            )
        if not any(row["task"] == task for row in score_rows(benchmark, results)):
            raise WorkerError(f"benchmark {benchmark}: lmms-eval gave {task} no score")


def score_rows(benchmark: str, results: dict) -> Iterator[dict]:
    """A row a task, metric and filter, tasks of a group and the group's own mean alike.

    What is no number (lmms-eval counts files to be handed in as metrics) is left out; `standard_error` is None where
    lmms-eval has none. Source: `consolidate_results` in lmms_eval/evaluator_utils.py.
    """
    for task, found in results["results"].items():
        for key, value in found.items():
            metric, _, kind = key.partition(",")
            if not kind or STDERR in metric or (number := _number(value)) is None:
                continue
            n = results["n-samples"].get(task, {}).get("effective") or _number(found.get("samples"))
            yield dict(
                benchmark=benchmark, task=task, version=_version(results, task), metric=metric, filter=kind,
                value=number, standard_error=_number(found.get(f"{metric}{STDERR},{kind}")),
                n=None if n is None else int(n),
            )  # fmt: skip


def sample_rows(benchmark: str, results: dict) -> Iterator[dict]:
    """A row a document (and filter, where a task has several)."""
    for task, samples in results["samples"].items():
        for sample in samples:
            scores = {name: value for name, value in sample.items() if name not in SAMPLE_FIELDS}
            yield dict(
                benchmark=benchmark, task=task, doc_id=sample["doc_id"], prompt=_prompt(sample),
                target=_text(sample["target"]), response=_text(sample["resps"]),
                filtered=_text(sample["filtered_resps"]), scores=json.dumps(scores, ensure_ascii=False),
            )  # fmt: skip


def logged(model: str, scores: list[dict], lmms_eval: str) -> tuple[dict[str, float], dict[str, str]]:
    """A model's scores as metrics `MODEL/TASK/METRIC`, and the versions as tags."""
    metrics, tags = {}, {"benchmark.lmms-eval": lmms_eval}
    for row in scores:
        kind = "" if row["filter"] == "none" else f"/{row['filter']}"
        name = f"{model}/{row['task']}/{row['metric']}{kind}"
        metrics[name] = row["value"]
        if row["standard_error"] is not None:
            metrics[f"{name}/standard_error"] = row["standard_error"]
        tags[f"benchmark.{row['task']}.version"] = row["version"]
    return metrics, tags


def _prompt(sample: dict) -> str:
    """The text that came with the images: of what a request holds, lmms-eval's first text."""
    return next((part for part in sample["arguments"] if isinstance(part, str)), "")


def _version(results: dict, task: str) -> str:
    """A task's version; "unversioned" where its file states none."""
    stated = results.get("versions", {}).get(task)
    if stated is None or stated == "Yaml":
        metadata = results.get("configs", {}).get(task, {}).get("metadata") or {}
        listed = metadata if isinstance(metadata, list) else [metadata]
        stated = next((one["version"] for one in listed if isinstance(one, dict) and "version" in one), None)
    return "unversioned" if stated is None else str(stated)


def _text(value: object) -> str:
    """A response nested in lists of one, as text; what is more than one stays JSON."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
