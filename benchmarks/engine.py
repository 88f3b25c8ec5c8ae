"""`python -m benchmarks engine`: time until the demo's teacher, masked at five ratios, has answered 64 prompts at each.

Ours: one engine, its weights masked anew between the ratios. Baseline: an engine started for each of five masked
checkpoints, which lie there before; the same start (`masters.models.generation.engine`), the same requests. Every
engine is a fresh process, imports included. Both must say the same.
"""

import json
import shutil
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import save_file

from benchmarks.measure import Row, compare
from benchmarks.pipeline import CONFIG, ROOT
from masters.config import Config, Generate, Runtime
from masters.config.loading import load
from masters.config.mask_schedule import mask_stages
from masters.data.sources.easyvqa import EasyVqa
from masters.execution import processes
from masters.execution.processes import Child
from masters.models.masking import group_thresholds, safetensors_tensors
from masters.models.model_loading import masked_tensors


@dataclass(frozen=True)
class Sizes:
    prompts: int = 64
    ratios: int = 5  # the demo's first ones
    repeats: int = 3


@dataclass(frozen=True)
class Masked:
    """A checkpoint to answer with, and the thresholds to mask it at first."""

    folder: str
    thresholds: dict[str, float]


def measured(sizes: Sizes = Sizes()) -> list[Row]:
    """Raises AssertionError if the two ways answer differently."""
    config = load(CONFIG)
    teacher, of = ROOT / config.teachers[0].model, config.teachers[0]
    ratios = mask_stages(of.r_max, of.mask_step)[: sizes.ratios]
    rows = group_thresholds(lambda: safetensors_tensors(teacher), ratios, config.mask.granularity)
    masks = [{r["tensor"]: r["threshold"] for r in rows if r["mask_ratio"] == ratio} for ratio in ratios]
    prompts = [[f"{row.root}/{row.image}", row.question] for row in islice(EasyVqa().rows(), sizes.prompts)]
    with TemporaryDirectory(prefix="masters-bench-") as work:
        folder = Path(work)
        one = [child("one", [Masked(str(teacher), mask) for mask in masks], prompts, config, folder)]
        five = [
            child(f"masked-{n}", [Masked(masked_checkpoint(teacher, mask, folder / f"teacher-{n}"), {})], prompts,
                  config, folder)
            for n, mask in enumerate(masks)
        ]  # fmt: skip
        processes.run(one[:1], 1, lambda *_: None)  # what vLLM keeps for later starts is there for both
        row = compare(
            f"{len(ratios)} ratios, {sizes.prompts} prompts, an engine each", "s",
            lambda: seconds(one), lambda: seconds(five), sizes.repeats,
        )  # fmt: skip
        if answers(one) != answers(five):
            raise AssertionError("masked checkpoints answer otherwise than the engine that masks in place")
    return [row]


def masked_checkpoint(folder: Path, thresholds: dict[str, float], out: Path) -> str:
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(dict(masked_tensors(folder, thresholds)), out / "model.safetensors", {"format": "pt"})
    return str(out)


def child(name: str, models: list[Masked], prompts: list[list[str]], config: Config, work: Path) -> Child:
    job = dict(
        models=[asdict(model) for model in models], prompts=prompts, out=str(work / f"{name}.answers"),
        samples=config.generate.teacher_responses, sampling=config.generate.model_dump(),
        runtime=config.runtime.model_dump(),
    )  # fmt: skip
    return Child(name, "benchmarks.engine", job, work, {})


def seconds(children: list[Child]) -> float:
    """Of all of them, one after the other."""
    began = time.monotonic()
    processes.run(children, 1, lambda *_: None)
    return time.monotonic() - began


def answers(children: list[Child]) -> list:
    return [said for one in children for said in json.loads(Path(one.job["out"]).read_text())]


def main(job_file: Path) -> None:
    """The engine's process: every model of the job answers all prompts."""
    from masters.models.generation.engine import Engine, Request

    job = json.loads(job_file.read_text())
    sampling, models = Generate(**job["sampling"]), [Masked(**model) for model in job["models"]]
    requests = [
        Request(Path(image).read_bytes(), question, job["samples"], seed=1000 * number)
        for number, (image, question) in enumerate(job["prompts"])
    ]
    found = []
    with Engine(Path(models[0].folder), sampling.dtype, Runtime(**job["runtime"])) as engine:
        for model in models:
            if model.thresholds:
                engine.remask(model.thresholds)
            replies = engine.generate(requests, sampling)
            found.append([[reply.response_token_ids for reply in said] for said in replies])
    Path(job["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    processes.child_main(main)
