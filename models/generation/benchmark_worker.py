"""The process that runs lmms-eval: one vLLM engine answers task after task, and each task's results become a file.

`python -m masters.models.generation.benchmark_worker JOB.json`. `masters.tasks.benchmark` makes the job, a
`BenchmarkJob`, and puts lmms-eval's packages on the process's path. lmms-eval is called as a library because its
command exits with 0 even if an evaluation failed.
"""

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from masters.common.errors import InputError, one_line
from masters.common.files import write_atomically
from masters.execution import child_process
from masters.models.generation import engine
from masters.models.generation.job import BenchmarkDone, BenchmarkJob

BATCH = 128  # documents given to the engine at a time
MODEL = "vllm"  # the model's name, by which some tasks choose their prompts
GENERATES = ("generate_until", "generate_until_multi_round", "generate_until_agentic")


def main(job_file: Path) -> None:
    job = BenchmarkJob.model_validate_json(job_file.read_text())
    job.results.mkdir(parents=True, exist_ok=True)
    files = {task: job.results / f"{number}.json" for number, task in enumerate(job.tasks)}
    missing = {task: file for task, file in files.items() if not file.exists()}
    for _ in range(len(files) - len(missing)):
        child_process.report_event(job_file, BenchmarkDone(task="kept from before", documents=0))
    if not missing:
        return
    from lmms_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = TaskManager(
        include_path=list(job.task_folders) or None, include_defaults=job.include_defaults, model_name=MODEL
    )
    for task in missing:
        _check_task(manager, task)
    model = _start_backend(job)
    for task, file in missing.items():
        results = _evaluate(model, manager, task, job)
        documents = sum(size["effective"] for size in results["n-samples"].values())
        write_atomically(file, json.dumps(results, default=_to_json))
        child_process.report_event(job_file, BenchmarkDone(task=task, documents=documents))


def _check_task(manager: Any, name: str) -> None:
    """Load a benchmark's data sets, before the engine is started. Raises InputError."""
    from lmms_eval.tasks import get_task_dict  # pyright: ignore[reportMissingImports]

    try:
        tasks = list(_flatten(get_task_dict([name], manager, "chat")))
    except Exception as error:  # from data sets, hubs and the task's own code
        cause = error.__cause__ or error  # after its retries lmms-eval raises an error of its own
        raise InputError(
            f"benchmark {name} cannot be loaded ({type(cause).__name__}: {one_line(cause)}); its data sets come from "
            "the Hugging Face hub: this machine must reach it or have them in its cache, some need HF_TOKEN"
        ) from error
    for task in tasks:
        if task.OUTPUT_TYPE not in GENERATES:
            raise InputError(
                f"benchmark {name}: {task.config.task} needs {task.OUTPUT_TYPE}; with vLLM lmms-eval runs tasks that "
                f"generate text ({GENERATES[0]})"
            )


def _flatten(tasks: dict) -> Iterator[Any]:
    """Yield the tasks of nested groups."""
    for task in tasks.values():
        if isinstance(task, dict):
            yield from _flatten(task)
        else:
            yield task


def _start_backend(job: BenchmarkJob) -> Any:
    """Return lmms-eval's vLLM backend with the options of the pipeline's own engines."""
    options = engine.engine_options(job.folder, job.dtype, job.runtime)  # before lmms-eval imports vLLM
    from lmms_eval.models.chat.vllm import VLLM  # pyright: ignore[reportMissingImports]
    from transformers import AutoProcessor

    class Backend(VLLM):
        def _select_max_new_tokens(self, requested: Any) -> int:
            """Return the task's own limit where it has one: lmms-eval would take the larger of the two."""
            return int(requested) if requested else self.max_new_tokens

    backend = Backend(**options, batch_size=BATCH, max_new_tokens=job.max_tokens)
    processor = AutoProcessor.from_pretrained(job.folder, trust_remote_code=False)
    engine.suppress_padding_tokens(backend.client, getattr(processor, "tokenizer", processor))
    return backend


def _evaluate(model: Any, manager: Any, task: str, job: BenchmarkJob) -> dict:
    from lmms_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]

    # as lmms-eval's command sets them: a folder for files to submit to a benchmark's server; scoring needs no images
    arguments = Namespace(output_path=str(job.results / "submissions"), process_with_media=False)
    return simple_evaluate(
        model=model, tasks=[task], task_manager=manager, limit=job.limit, batch_size=BATCH, cli_args=arguments
    )


def _to_json(value: object) -> object:
    """Return a NumPy number as a Python one, anything else that JSON does not have (images, functions) as text."""
    return value.item() if isinstance(value, np.generic) else str(value)


if __name__ == "__main__":
    child_process.child_main(main)
