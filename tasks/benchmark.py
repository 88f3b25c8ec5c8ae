"""benchmarks: a model on tasks of lmms-eval, through its vLLM backend, in a process of its own."""

import json
import os
from pathlib import Path

from prefect import task

from masters.checks.model_folder import LocalModel
from masters.common.hashing import digest
from masters.config import Config
from masters.evaluation.benchmark_results import check_whole, sample_rows, score_rows
from masters.evaluation.benchmark_selection import PACKAGES, BenchmarkSelection
from masters.execution import processes
from masters.store import tables
from masters.store.artifacts import Artifact, External, Identity, Upstream
from masters.tasks.build import STAGE, build_or_reuse
from masters.tasks.run_context import Context, Run

VERSION = 1
# images reach the model as they are, and nothing is told to anybody
ENVIRONMENT = {
    "LMMS_IMAGE_ENCODE_FORMAT": "PNG", "LMMS_EVAL_PLUGINS": "", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


def identity(context: Context, model: LocalModel, asked: BenchmarkSelection, limit: int | None, name: str) -> Identity:
    generate = context.config.generate
    made_of = dict(
        tasks=list(asked.tasks), lmms_eval=asked.version, limit=limit, max_tokens=generate.max_tokens,
        dtype=generate.dtype,
    )  # fmt: skip
    inputs = {"model": model.digest} | {f"tasks {n}": own for n, own in enumerate(sorted(asked.own.values()))}
    return Identity(name, VERSION, made_of, inputs, slug=context.config.name)


@task(name="benchmarks", task_run_name="{name}", **STAGE)
def benchmark(
    run: Run, model: LocalModel, asked: BenchmarkSelection, limit: int | None = None, name: str = "benchmarks"
) -> Artifact:
    """Tables `scores` and `samples`, files `results/N.json`; facts `scores`: the rows of that table.

    `limit`: of documents a task, None for all; `name`: of the stage, another one for every model. Raises WorkerError
    where lmms-eval failed or left something out, InputError where a data set cannot be had.
    """
    made_of = identity(run, model, asked, limit, name)

    def build() -> tuple[dict[str, str], dict, dict]:
        folder = run.work(made_of)
        how = _ran(run, made_of, child(run.config, model, asked, limit, folder))
        scores, samples, files = [], [], {}
        for number, benchmark in enumerate(asked.tasks):
            results = json.loads((folder / f"results/{number}.json").read_text(encoding="utf-8"))
            check_whole(benchmark, results)
            scores += score_rows(benchmark, results)
            samples += sample_rows(benchmark, results)
            raw = {key: value for key, value in results.items() if key != "samples"}
            files[f"results/{number}.json"] = json.dumps(raw, indent=1).encode()
        files["scores/0.parquet"] = tables.encode(scores, tables.BENCHMARK_SCORES)
        files["samples/0.parquet"] = tables.encode(samples, tables.BENCHMARK_SAMPLES)
        for file, content in files.items():
            run.storage.write(f"{made_of.folder}/{file}", content)
        facts = dict(rows=len(samples), scores=scores, lmms_eval=asked.version)
        return {file: digest(content) for file, content in files.items()}, facts, how

    upstream: Upstream = {f"model {model.name}": model.origin} | {
        f"tasks {n}": External("tasks", folder, own) for n, (folder, own) in enumerate(asked.own.items())
    }
    artifact = build_or_reuse(run, made_of, upstream, build)
    run.tracker.benchmarks(artifact, model.name)
    return artifact


def child(
    config: Config, model: LocalModel, asked: BenchmarkSelection, limit: int | None, folder: Path
) -> processes.Child:
    """lmms-eval's process, which leaves `folder`/results/N.json of the N-th task and keeps those that are there."""
    job = dict(
        folder=str(model.folder), tasks=list(asked.tasks), own=sorted(asked.own), theirs=asked.theirs, limit=limit,
        dtype=config.generate.dtype, max_tokens=config.generate.max_tokens, results=str(folder / "results"),
        runtime=config.runtime.model_dump(),
    )  # fmt: skip
    path = os.pathsep.join(part for part in (str(PACKAGES), os.environ.get("PYTHONPATH")) if part)
    environment = ENVIRONMENT | {"PYTHONPATH": path}
    return processes.Child(
        f"benchmarks-{model.name}", "masters.models.generation.benchmark_worker", job, folder, environment
    )


def _ran(run: Run, made_of: Identity, process: processes.Child) -> dict:
    """Run lmms-eval. Returns how it ran."""
    total, done, documents = len(process.job["tasks"]), 0, 0
    with run.progress(made_of, "benchmarks") as progress:

        def count(_: str, line: dict) -> None:
            nonlocal done, documents
            done, documents = done + 1, documents + line["documents"]
            progress.update(done, total, f"{documents:,} documents, last: {line['task']}")

        progress.update(0, total)
        ran = processes.run([process], 1, count, run.config.runtime.heartbeat_timeout_minutes * 60)
    return dict(engines=1, documents=documents, **ran.told())
