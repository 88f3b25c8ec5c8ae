"""`python -m benchmarks engine`: time until the demo's teacher, masked at five ratios, has answered 64 prompts at each.

Ours: one engine that masks its weights again between the ratios. Baseline: an engine for each of five masked
checkpoints, which are written before; with the same options (`masters.models.generation.engine`) and the same requests.
Every engine is a fresh process, imports included. Both must give the same responses.
"""

import json
import shutil
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import BaseModel
from safetensors.torch import save_file

from benchmarks.measure import Row, compare
from benchmarks.pipeline import CONFIG, ROOT
from masters.config import Config, Runtime, Sampling
from masters.config.loading import load
from masters.config.mask_schedule import mask_ratios
from masters.data.sources.easyvqa import EasyVqaSource
from masters.execution import child_process, processes
from masters.execution.processes import Child
from masters.models.masking import group_thresholds, iterate_tensors
from masters.models.model_loading import iterate_masked_tensors


@dataclass(frozen=True)
class Sizes:
    prompts: int = 64
    ratios: int = 5  # the demo's first ones
    repeats: int = 3


class Checkpoint(BaseModel):
    """A checkpoint to answer with, and thresholds to mask it at first; none for a checkpoint as it is."""

    folder: Path
    thresholds: dict[str, float] = {}


class Prompt(BaseModel):
    image: Path
    question: str


class Job(BaseModel):
    """Job of an engine's process: each checkpoint answers all prompts; response token ids are written to `out`."""

    checkpoints: list[Checkpoint]
    prompts: list[Prompt]
    out: Path
    samples: int
    sampling: Sampling
    runtime: Runtime


Responses = list[list[list[list[int]]]]  # by checkpoint, prompt and sample: token ids


def measure(sizes: Sizes = Sizes()) -> list[Row]:
    """Raises AssertionError if the two give different responses."""
    config = load(CONFIG)
    teacher, schedule = ROOT / config.teachers[0].model, config.teachers[0]
    ratios = mask_ratios(schedule.r_max, schedule.mask_step)[: sizes.ratios]
    rows = group_thresholds(lambda: iterate_tensors(teacher), ratios, config.mask.granularity)
    masks = [{r["tensor"]: r["threshold"] for r in rows if r["mask_ratio"] == ratio} for ratio in ratios]
    questions = islice(EasyVqaSource().rows(), sizes.prompts)
    prompts = [Prompt(image=Path(f"{row.root}/{row.image}"), question=str(row.question)) for row in questions]
    with TemporaryDirectory(prefix="masters-bench-") as name:
        folder = Path(name)
        masked_in_place = [Checkpoint(folder=teacher, thresholds=mask) for mask in masks]
        one_engine = [make_child("one", masked_in_place, prompts, config, folder)]
        engine_each = []
        for n, mask in enumerate(masks):
            masked = Checkpoint(folder=write_masked_checkpoint(teacher, mask, folder / f"teacher-{n}"))
            engine_each.append(make_child(f"masked-{n}", [masked], prompts, config, folder))
        run_in_turn(one_engine)  # afterwards both find what vLLM caches for later starts
        row = compare(
            f"{len(ratios)} ratios, {sizes.prompts} prompts, an engine each",
            "s",
            lambda: run_in_turn(one_engine),
            lambda: run_in_turn(engine_each),
            sizes.repeats,
        )
        if read_responses(one_engine) != read_responses(engine_each):
            raise AssertionError("masked checkpoints give other responses than the engine that masks in place")
    return [row]


def write_masked_checkpoint(folder: Path, thresholds: dict[str, float], out: Path) -> Path:
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(dict(iterate_masked_tensors(folder, thresholds)), out / "model.safetensors", {"format": "pt"})
    return out


def make_child(name: str, checkpoints: list[Checkpoint], prompts: list[Prompt], config: Config, folder: Path) -> Child:
    job = Job(
        checkpoints=checkpoints,
        prompts=prompts,
        out=folder / f"{name}.responses",
        samples=config.generate.teacher_responses,
        sampling=config.generate.sampling,
        runtime=config.runtime,
    )
    return Child(name, "benchmarks.engine", job, folder)


def run_in_turn(children: list[Child]) -> float:
    """Run children one after the other. Returns the seconds of all."""
    start = time.monotonic()
    processes.run(children, 1, lambda *_: None)
    return time.monotonic() - start


def read_responses(children: list[Child]) -> Responses:
    jobs = [Job.model_validate(child.job) for child in children]
    return [responses for job in jobs for responses in json.loads(job.out.read_text())]


def main(job_file: Path) -> None:
    """Run the engine's process."""
    from masters.models.generation.engine import Engine, Request

    job = Job.model_validate_json(job_file.read_text())
    requests = [
        Request(prompt.image.read_bytes(), prompt.question, job.samples, seed=1000 * number)
        for number, prompt in enumerate(job.prompts)
    ]
    responses: Responses = []
    with Engine(job.checkpoints[0].folder, job.sampling.dtype, job.runtime) as engine:
        for checkpoint in job.checkpoints:
            if checkpoint.thresholds:
                engine.remask(checkpoint.thresholds)
            replies = engine.generate(requests, job.sampling)
            responses.append([[reply.response_token_ids for reply in each] for each in replies])
    job.out.write_text(json.dumps(responses))


if __name__ == "__main__":
    child_process.child_main(main)
