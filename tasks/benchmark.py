"""benchmarks: evaluate a model on tasks of lmms-eval, through its vLLM backend, in a process of its own."""

import json
from pathlib import Path

from prefect import task

from masters.checks.model_folder import LocalModel
from masters.config import Config
from masters.evaluation.benchmark_index import lmms_eval_environment
from masters.evaluation.benchmark_results import check_complete, sample_rows, score_rows
from masters.evaluation.benchmark_selection import BenchmarkSelection
from masters.execution import processes
from masters.execution.processes import Child, WorkerModule
from masters.models.generation.job import BenchmarkDone, BenchmarkJob
from masters.store import tables
from masters.store.artifacts import Artifact, External, Identity, Upstream
from masters.tasks.build_or_reuse import TASK_OPTIONS, StageResult, build_or_reuse, write_file
from masters.tasks.run_context import Context, Run

VERSION = 1


def make_identity(
    context: Context, model: LocalModel, selection: BenchmarkSelection, limit: int | None, name: str
) -> Identity:
    generate = context.config.generate
    config = dict(
        tasks=list(selection.tasks),
        lmms_eval=selection.version,
        limit=limit,
        max_tokens=generate.max_tokens,
        dtype=generate.dtype,
    )
    task_digests = enumerate(sorted(selection.task_folders.values()))
    inputs = {"model": model.digest} | {f"tasks {number}": sha256 for number, sha256 in task_digests}
    return Identity(name, VERSION, config, inputs, slug=context.config.name)


@task(name="benchmarks", task_run_name="{name}", **TASK_OPTIONS)
def benchmark(
    run: Run, model: LocalModel, selection: BenchmarkSelection, limit: int | None = None, name: str = "benchmarks"
) -> Artifact:
    """Build the tables `scores` and `samples` and the files `results/N.json`. The fact `scores` repeats that table.

    `limit`: documents for each task, None for all. `name`: the stage's name, a different one for each model. Raises
    WorkerError if lmms-eval failed or left something out, InputError if a data set is unavailable.
    """
    identity = make_identity(run, model, selection, limit, name)

    def build() -> StageResult:
        folder = run.work_folder(identity)
        execution = _run_lmms_eval(run, identity, lmms_eval_process(run.config, model, selection, limit, folder))
        scores, samples, files = [], [], {}
        for number, benchmark in enumerate(selection.tasks):
            results = json.loads((folder / f"results/{number}.json").read_text(encoding="utf-8"))
            check_complete(benchmark, results)
            scores += score_rows(benchmark, results)
            samples += sample_rows(benchmark, results)
            summary = {key: value for key, value in results.items() if key != "samples"}
            files[f"results/{number}.json"] = json.dumps(summary, indent=1).encode()
        files["scores/0.parquet"] = tables.encode(scores, tables.BENCHMARK_SCORES)
        files["samples/0.parquet"] = tables.encode(samples, tables.BENCHMARK_SAMPLES)
        digests: dict[str, str] = {}
        for file, content in files.items():
            digests |= write_file(run.storage, identity, file, content)
        return StageResult(digests, dict(rows=len(samples), scores=scores, lmms_eval=selection.version), execution)

    upstream: Upstream = {f"model {model.name}": model.origin} | {
        f"tasks {number}": External("tasks", folder, sha256)
        for number, (folder, sha256) in enumerate(selection.task_folders.items())
    }
    artifact = build_or_reuse(run, identity, upstream, build)
    run.tracker.log_benchmarks(artifact, model.name)
    return artifact


def lmms_eval_process(
    config: Config, model: LocalModel, selection: BenchmarkSelection, limit: int | None, folder: Path
) -> Child:
    """Make lmms-eval's process. It writes `folder`/results/N.json for the N-th task and keeps finished ones."""
    job = BenchmarkJob(
        folder=model.folder,
        tasks=selection.tasks,
        task_folders=tuple(sorted(selection.task_folders)),
        include_defaults=selection.include_defaults,
        limit=limit,
        dtype=config.generate.dtype,
        max_tokens=config.generate.max_tokens,
        results=folder / "results",
        runtime=config.runtime,
    )
    return Child(f"benchmarks-{model.name}", WorkerModule.BENCHMARK, job, folder, lmms_eval_environment())


def _run_lmms_eval(run: Run, identity: Identity, process: Child) -> dict:
    """Run lmms-eval, and return how it ran."""
    assert isinstance(process.job, BenchmarkJob)
    total, done, documents = len(process.job.tasks), 0, 0
    with run.track_progress(identity, "benchmarks") as progress:

        def on_event(_: str, line: dict) -> None:
            nonlocal done, documents
            event = BenchmarkDone.model_validate(line)
            done, documents = done + 1, documents + event.documents
            progress.update(done, total, f"{documents:,} documents, last: {event.task}")

        progress.update(0, total)
        usage = processes.run([process], 1, on_event, run.config.runtime.heartbeat_timeout_minutes * 60)
    return dict(engines=1, documents=documents, **usage.summarize())
