"""lmms-eval's process: one vLLM engine answers task after task, each task's results are a file as soon as it ends.

`python -m masters.models.generation.benchmark_worker JOB.json`; the job is made by `masters.tasks.benchmark`, which
also lets this process see lmms-eval's packages. Called as a library: its command line ends with 0 where an evaluation
failed.
"""

import json
import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from masters.common.errors import InputError
from masters.config import Runtime
from masters.execution import processes
from masters.models.generation import engine

BATCH = 128  # documents that an engine is handed at a time
MODEL = "vllm"  # by which tasks choose prompts that are made for a model
GENERATES = ("generate_until", "generate_until_multi_round", "generate_until_agentic")


def main(job_file: Path) -> None:
    job = json.loads(job_file.read_text())
    folder = Path(job["results"])
    folder.mkdir(parents=True, exist_ok=True)
    todo = [(task, folder / f"{n}.json") for n, task in enumerate(job["tasks"]) if not (folder / f"{n}.json").exists()]
    for _ in range(len(job["tasks"]) - len(todo)):
        processes.report(job_file, event="benchmark", task="kept from before", documents=0)
    if not todo:
        return
    from lmms_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    tasks = TaskManager(include_path=job["own"] or None, include_defaults=job["theirs"], model_name=MODEL)
    for task, _ in todo:
        _check_task(tasks, task)
    model = _backend(job)
    for task, file in todo:
        results = _evaluated(model, tasks, task, job)
        documents = sum(size["effective"] for size in results["n-samples"].values())
        _write(file, results)
        processes.report(job_file, event="benchmark", task=task, documents=documents)


def _check_task(tasks: Any, name: str) -> None:
    """Have a benchmark's data sets loaded before the engine is. Raises InputError."""
    from lmms_eval.tasks import get_task_dict  # pyright: ignore[reportMissingImports]

    try:
        found = list(_leaves(get_task_dict([name], tasks, "chat")))
    except Exception as error:  # of data sets, hubs and the task's own code
        cause = error.__cause__ or error  # lmms-eval tries again and raises that it has
        said = " ".join(str(cause).split())[:300]
        raise InputError(
            f"benchmark {name} cannot be loaded ({type(cause).__name__}: {said}); its data sets come from the Hugging "
            "Face hub: this machine must reach it or have them in its cache, some want HF_TOKEN"
        ) from error
    for task in found:
        if task.OUTPUT_TYPE not in GENERATES:
            raise InputError(
                f"benchmark {name}: {task.config.task} asks for {task.OUTPUT_TYPE}; with vLLM lmms-eval takes tasks "
                f"that generate ({GENERATES[0]})"
            )


def _leaves(tasks: dict) -> Iterator[Any]:
    for task in tasks.values():
        if isinstance(task, dict):
            yield from _leaves(task)
        else:
            yield task


def _backend(job: dict) -> Any:
    """lmms-eval's vLLM backend, its engine set up as the pipeline's own engines are."""
    folder = Path(job["folder"])
    settings = engine.settings(folder, job["dtype"], Runtime(**job["runtime"]))  # before lmms-eval imports vLLM
    from lmms_eval.models.chat.vllm import VLLM  # pyright: ignore[reportMissingImports]
    from transformers import AutoProcessor

    class Backend(VLLM):
        def _select_max_new_tokens(self, asked: Any) -> int:
            """The task's own limit where it states one: lmms-eval would take the larger of the two."""
            return int(asked) if asked else self.max_new_tokens

    backend = Backend(**settings, batch_size=BATCH, max_new_tokens=job["max_tokens"])
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    engine.only_words(backend.client, getattr(processor, "tokenizer", processor))
    return backend


def _evaluated(model: Any, tasks: Any, name: str, job: dict) -> dict:
    from lmms_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]

    # what its command line would pass on: where files to be handed in go, and that scoring needs no images
    arguments = Namespace(output_path=str(Path(job["results"]) / "submissions"), process_with_media=False)
    return simple_evaluate(
        model=model, tasks=[name], task_manager=tasks, limit=job["limit"], batch_size=BATCH, cli_args=arguments
    )


def _write(file: Path, results: dict) -> None:
    """Whole or not at all."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(results, default=_plain), encoding="utf-8")
    os.replace(new, file)


def _plain(value: object) -> object:
    """NumPy's numbers are numbers; whatever else JSON does not have (images, functions) is told by its text."""
    return value.item() if isinstance(value, np.generic) else str(value)


if __name__ == "__main__":
    processes.child_main(main)
