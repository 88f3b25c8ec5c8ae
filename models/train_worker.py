"""The trainer's process: `python -m masters.models.train_worker JOB.json`, one per rank.

Ranks meet through a file (no socket listens beyond loopback); rank 0 reports, saves and exports.
"""

import json
import os
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch
import torch.distributed as dist
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar as disable_progress_bars
from transformers import AutoConfig, AutoProcessor

from masters import artifacts, processes
from masters.config import Rewards, Runtime, Train
from masters.errors import MastersError
from masters.models import blocks, checkpoints, devices, footprint, passes, precision, trainer
from masters.models.activations import checkpoint_activations
from masters.models.families import family_of
from masters.models.families.base import VLM
from masters.models.fitting import AGAIN
from masters.models.masking import safetensors_tensors
from masters.models.prompts import label_tokens, model_inputs
from masters.models.ranks import collected
from masters.models.response_groups import response_groups
from masters.models.round_part import Part
from masters.models.sharding import Sharding, own, sharding_of
from masters.models.training_data import Group, label_groups, plan_steps
from masters.models.trees import Question
from masters.shards import Ref
from masters.storage import Storage

EVERY_RANK = {"token_budget", AGAIN}  # events that each rank tells of itself; rank 0 speaks for all otherwise
ALIVE = "alive"  # what the others say instead: one that is silent for long is taken for lost


class Prompts:
    """Makes the processor's prompt (text and image tensors) of a question: one user turn, the image, the question.

    Rows are read at random from a memory-mapped copy of the questions table. Prompts are kept up to `CACHE_BYTES`.
    """

    CACHE_BYTES = 512 << 20

    def __init__(self, folder: Path, data: artifacts.Artifact, work: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        # a copy is named by its content, and whole: the other ranks and an interrupted run's successor use it too
        local = data.storage.download(f"{data.folder}/questions", work / f"questions-{data.record['digest'][:16]}")
        parts: list[Any] = [str(local / name.rsplit("/", 1)[1]) for name in data.files("questions")]
        disable_progress_bars()
        self.table = Dataset.from_parquet(parts, cache_dir=str(work / "arrow"), keep_in_memory=False)
        self.first = [0, *accumulate(parquet.read_metadata(part).num_rows for part in parts)]
        self.cache: dict[Ref, dict[str, torch.Tensor]] = {}
        self.room = self.CACHE_BYTES

    def row(self, ref: Ref) -> dict:
        return self.table[self.first[ref.file] + ref.row]

    def prompt(self, ref: Ref) -> dict[str, torch.Tensor]:
        """The processor's output, [1, P] token tensors and the family's image tensors."""
        if ref in self.cache:
            return self.cache[ref]
        row = self.row(ref)
        prompt = model_inputs(self.processor, row["question"], row["image"])
        size = sum(tensor.nbytes for tensor in prompt.values())
        if size <= self.room:
            self.cache[ref], self.room = prompt, self.room - size
        return prompt

    def label(self, answer: str) -> list[int]:
        return label_tokens(self.processor.tokenizer, answer)

    def question(self, group: Group) -> Question:
        prompt = self.prompt(group.ref)
        if group.prompt is not None and prompt["input_ids"][0].tolist() != group.prompt.tolist():
            raise MastersError(
                f"question {group.ref.question_id}: the engine's prompt ({len(group.prompt)} tokens) is not the "
                f"processor's ({prompt['input_ids'].shape[1]} tokens): vLLM and transformers disagree on its image"
            )
        return Question(group.ref.question_id, prompt, group.responses)


def main(job_file: Path) -> None:
    job = json.loads(job_file.read_text())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world > 1 or job["sharding"] != "replicate":
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        meeting = f"file://{os.environ['MASTERS_RENDEZVOUS']}"
        dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=world)
    ready = prepare(job, job_file, rank, world)
    trainer.fit(ready)
    held = ready.sharding.held(ready.student)
    trained = collected(ready.sharding, held, held)
    if rank == 0:
        export(trained, Path(job["student"]), Path(job["out"]))
        ready.report(event="exported")
    if dist.is_initialized():
        dist.destroy_process_group()


def prepare(job: dict, job_file: Path, rank: int, world: int) -> trainer.Job:
    """Load models and tables and plan the steps."""
    storage, train = Storage(job["store"]), Train(**job["train"])
    data = artifacts.load(storage, job["tables"]["data"])
    prompts = Prompts(Path(job["student"]), data, job_file.parent)
    refs = [Ref(*ref) for ref in job["refs"]]
    groups, empty = _groups(job, storage, train, data, prompts, refs)
    steps = plan_steps(groups, len(job["ratios"]), train.epochs, train.questions_per_step, train.seed)
    planned = passes.plan(steps, [passes.size_of(group) for group in groups], job["token_budget"], world)

    def report(**fields: object) -> None:
        told = fields if rank == 0 or fields["event"] in EVERY_RANK else dict(event=ALIVE)
        processes.report(job_file, **told)

    told = {} if planned is None else dict(passes=planned.passes, largest_pass=planned.largest_tokens)
    report(event="start", groups=len(groups), steps=len(steps), empty_responses=empty, planned=told)
    device = devices.of_rank(rank, world)
    _check_memory(job, train, planned, groups, len(steps), device, world)
    sharding = sharding_of(job["sharding"], device)
    student, teacher, reference = _models(job, train, device, sharding)
    report(event="held", **_held(student, sharding, world), sharding=job["sharding"])
    return trainer.Job(
        student=student,
        teacher=teacher,
        remask=lambda stage: _remask(teacher, job, stage, sharding),
        family=family_of(AutoConfig.from_pretrained(job["student"], trust_remote_code=False).model_type),
        train=train,
        rewards=Rewards(**job["rewards"]),
        groups=groups,
        steps=steps,
        ratios=job["ratios"],
        question=prompts.question,
        storage=storage,
        checkpoints=job["checkpoints"],
        checkpoint_steps=job["checkpoint_steps"],
        token_budget=job["token_budget"],
        report=report,
        reference=reference,
        end_tokens=_end_tokens(student, prompts.processor.tokenizer),
        probe=_probe(prompts, [Ref(*ref) for ref in job["probe"]]),
        rank=rank,
        world=world,
        sharding=sharding,
        part=Part(**job["part"]),
    )


def _check_memory(
    job: dict, train: Train, planned: passes.Plan | None, groups: Sequence[Group], steps: int, device: str, world: int
) -> None:
    """Raises InputError, before any model is loaded, if this machine does not have what training needs."""
    available, ranks = footprint.free(device, world)
    if world > 1:
        dist.barrier()  # nobody loads a model before everyone has looked
    tokens = planned.largest_tokens if planned else 0
    image_token = AutoConfig.from_pretrained(job["student"], trust_remote_code=False).image_token_id
    images = sum(int((groups[g].prompt == image_token).sum()) for g in planned.largest) if planned else 0
    length = tokens if device == "cpu" else blocks.whole(tokens)
    saves = device == "cpu" and (steps > job["checkpoint_steps"] or bool(job["part"]["hand_over"]))
    teacher = None if train.objective == "sft" else Path(job["teacher"])
    runtime = Runtime(sharding=job["sharding"], activation_checkpointing=job["activation_checkpointing"])
    needed = footprint.footprint(Path(job["student"]), teacher, train, (length, images), world, saves, device, runtime)
    footprint.check(needed.on(device), available, ranks, device, length)


def _models(job: dict, train: Train, device: str, sharding: Sharding) -> tuple[VLM, VLM | None, VLM | None]:
    """Student, teacher and pi_ref, each let go of as a whole before the next is loaded.

    What is not trained is held in the type that is computed in; a resumed run has the same pi_ref, the round's start.
    """
    hold = partial(sharding.hold, train=train)
    student = checkpoints.load_model(Path(job["student"]), train.dtype, device, hold)
    if job["activation_checkpointing"]:
        checkpoint_activations(student)

    def frozen(folder: str) -> VLM:
        return checkpoints.load_model(Path(folder), precision.frozen_dtype(train), device, sharding.hold)

    teacher = None if train.objective == "sft" else frozen(job["teacher"])
    return student, teacher, frozen(job["student"]) if train.holds_reference else None


def _end_tokens(student: VLM, tokenizer: Any) -> frozenset[int]:
    """The tokens at which an engine ends a response: the tokenizer's, and those of the model's generation settings."""
    configured = student.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if token is not None)


def _held(student: torch.nn.Module, sharding: Sharding, world: int) -> dict[str, float]:
    """How many processes there are, and what share of the student's weights this one holds."""
    parameters = sharding.held(student).values()
    mine, whole = (sum(p.numel() for p in parts) for parts in (map(own, parameters), parameters))
    return dict(processes=world, weights_share=round(mine / whole, 4))


def export(trained: dict[str, torch.Tensor], source: Path, out: Path) -> None:
    """A Hugging Face folder in the data type of the student it came from, with its processor and tokenizer.

    `trained`: the student's parameters, whole.
    """
    dtype = next(tensor.dtype for _, tensor in safetensors_tensors(source) if tensor.is_floating_point())
    student = checkpoints.load_model(source, str(dtype).removeprefix("torch."))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(trained.pop(name))
    student.save_pretrained(out)
    AutoProcessor.from_pretrained(source, trust_remote_code=False).save_pretrained(out)


def _groups(job: dict, storage: Storage, train: Train, data: artifacts.Artifact, prompts: Prompts, refs: list[Ref]):
    if train.targets == "labels":
        answers = {
            r["question_id"]: prompts.label(r["answer"]) for r in data.rows("questions", ["question_id", "answer"])
        }
        return label_groups(refs, answers, job["ratios"], job["coverage"]), 0
    tables = job["tables"]
    verdicts = artifacts.load(storage, tables["verdicts"]) if "verdicts" in tables else None
    responses = artifacts.load(storage, tables["responses"])
    return response_groups(refs, responses, verdicts, job["ratios"], job["coverage"], job["mask_stage"])


def _probe(prompts: Prompts, refs: list[Ref]) -> list[Question]:
    return [Question(ref.question_id, prompts.prompt(ref), [prompts.label(prompts.row(ref)["answer"])]) for ref in refs]


def _remask(teacher: VLM, job: dict, stage: int, sharding: Sharding) -> None:
    checkpoints.remask(teacher, Path(job["teacher"]), job["thresholds"][str(job["ratios"][stage])], sharding)


if __name__ == "__main__":
    processes.child_main(main)
