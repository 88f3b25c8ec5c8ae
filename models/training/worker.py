"""The trainer's process: `python -m masters.models.training.worker JOB.json`, one per rank.

Ranks meet through a file (no socket listens beyond loopback); rank 0 reports, saves and exports.
"""

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig

from masters.config import Rewards, Runtime, Train
from masters.data.question_shards import Ref
from masters.execution import processes
from masters.models import devices, model_loading
from masters.models.distributed import Sharding, mixed_precision, sharding_of, to_local
from masters.models.distributed.activation_checkpointing import checkpoint_activations
from masters.models.distributed.collectives import gather_to_rank0
from masters.models.families import family_of
from masters.models.families.base import VLM
from masters.models.model_loading import export
from masters.models.packing import flex_attention
from masters.models.packing.prefix_tree import Question
from masters.models.training import memory_estimate, microbatches, trainer
from masters.models.training.groups import Group, label_groups, plan_steps, response_groups
from masters.models.training.oom_retry import AGAIN
from masters.models.training.questions import QuestionPrompts
from masters.models.training.round_part import Part
from masters.store import artifacts
from masters.store.storage import Storage

EVERY_RANK = {"token_budget", AGAIN}  # events that each rank tells of itself; rank 0 speaks for all otherwise
ALIVE = "alive"  # what the others say instead: one that is silent for long is taken for lost


def main(job_file: Path) -> None:
    job = json.loads(job_file.read_text())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world > 1 or job["sharding"] != "replicate":
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        meeting = f"file://{os.environ['MASTERS_RENDEZVOUS']}"
        dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=world)
    ready = prepare(job, job_file, rank, world)
    trainer.fit(ready)
    held = ready.sharding.local_parameters(ready.student)
    trained = gather_to_rank0(ready.sharding, held, held)
    if rank == 0:
        export(trained, Path(job["student"]), Path(job["out"]))
        ready.report(event="exported")
    if dist.is_initialized():
        dist.destroy_process_group()


def prepare(job: dict, job_file: Path, rank: int, world: int) -> trainer.TrainContext:
    """Load models and tables and plan the steps."""
    storage, train = Storage(job["store"]), Train(**job["train"])
    data = artifacts.load(storage, job["tables"]["data"])
    prompts = QuestionPrompts(Path(job["student"]), data, job_file.parent)
    refs = [Ref(*ref) for ref in job["refs"]]
    groups, empty = _groups(job, storage, train, data, prompts, refs)
    steps = plan_steps(groups, len(job["ratios"]), train.epochs, train.questions_per_step, train.seed)
    planned = microbatches.plan(steps, [microbatches.size_of(group) for group in groups], job["token_budget"], world)

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
    return trainer.TrainContext(
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
    job: dict,
    train: Train,
    planned: microbatches.Plan | None,
    groups: Sequence[Group],
    steps: int,
    device: str,
    world: int,
) -> None:
    """Raises InputError, before any model is loaded, if this machine does not have what training needs."""
    available, ranks = memory_estimate.free(device, world)
    if world > 1:
        dist.barrier()  # nobody loads a model before everyone has looked
    tokens = planned.largest_tokens if planned else 0
    image_token = AutoConfig.from_pretrained(job["student"], trust_remote_code=False).image_token_id
    images = sum(int((groups[g].prompt == image_token).sum()) for g in planned.largest) if planned else 0
    length = tokens if device == "cpu" else flex_attention.whole(tokens)
    saves = device == "cpu" and (steps > job["checkpoint_steps"] or bool(job["part"]["hand_over"]))
    teacher = None if train.objective == "sft" else Path(job["teacher"])
    runtime = Runtime(sharding=job["sharding"], activation_checkpointing=job["activation_checkpointing"])
    needed = memory_estimate.footprint(
        Path(job["student"]), teacher, train, (length, images), world, saves, device, runtime
    )
    memory_estimate.check(needed.on(device), available, ranks, device, length)


def _models(job: dict, train: Train, device: str, sharding: Sharding) -> tuple[VLM, VLM | None, VLM | None]:
    """Student, teacher and pi_ref, each let go of as a whole before the next is loaded.

    What is not trained is held in the type that is computed in; a resumed run has the same pi_ref, the round's start.
    """
    hold = partial(sharding.shard_model, train=train)
    student = model_loading.load_model(Path(job["student"]), train.dtype, device, hold)
    if job["activation_checkpointing"]:
        checkpoint_activations(student)

    def frozen(folder: str) -> VLM:
        return model_loading.load_model(Path(folder), mixed_precision.frozen_dtype(train), device, sharding.shard_model)

    teacher = None if train.objective == "sft" else frozen(job["teacher"])
    return student, teacher, frozen(job["student"]) if train.holds_reference else None


def _end_tokens(student: VLM, tokenizer: Any) -> frozenset[int]:
    """The tokens at which an engine ends a response: the tokenizer's, and those of the model's generation settings."""
    configured = student.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if token is not None)


def _held(student: torch.nn.Module, sharding: Sharding, world: int) -> dict[str, float]:
    """How many processes there are, and what share of the student's weights this one holds."""
    parameters = sharding.local_parameters(student).values()
    mine, whole = (sum(p.numel() for p in parts) for parts in (map(to_local, parameters), parameters))
    return dict(processes=world, weights_share=round(mine / whole, 4))


def _groups(
    job: dict, storage: Storage, train: Train, data: artifacts.Artifact, prompts: QuestionPrompts, refs: list[Ref]
):
    if train.targets == "labels":
        answers = {
            r["question_id"]: prompts.label(r["answer"]) for r in data.rows("questions", ["question_id", "answer"])
        }
        return label_groups(refs, answers, job["ratios"], job["coverage"]), 0
    tables = job["tables"]
    verdicts = artifacts.load(storage, tables["verdicts"]) if "verdicts" in tables else None
    responses = artifacts.load(storage, tables["responses"])
    return response_groups(refs, responses, verdicts, job["ratios"], job["coverage"], job["mask_stage"])


def _probe(prompts: QuestionPrompts, refs: list[Ref]) -> list[Question]:
    return [Question(ref.question_id, prompts.prompt(ref), [prompts.label(prompts.row(ref)["answer"])]) for ref in refs]


def _remask(teacher: VLM, job: dict, stage: int, sharding: Sharding) -> None:
    model_loading.remask(teacher, Path(job["teacher"]), job["thresholds"][str(job["ratios"][stage])], sharding)


if __name__ == "__main__":
    processes.child_main(main)
