"""A trainer process: `python -m masters.models.training.worker JOB.json`, one for each rank.

Ranks find each other through a file, so that nothing listens beyond loopback. Rank 0 reports, saves and exports.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig

from masters.config import Runtime
from masters.data.question_shards import QuestionRef
from masters.execution import child_process
from masters.models import devices, model_loading
from masters.models.distributed import Sharding, make_sharding, mixed_precision, to_local
from masters.models.distributed.activation_checkpointing import checkpoint_activations
from masters.models.distributed.collectives import gather_to_rank0
from masters.models.families import family_of
from masters.models.families.base import VLM
from masters.models.packing import flex_attention
from masters.models.packing.prefix_tree import Question
from masters.models.prompts import vocabulary_size
from masters.models.training import load_balancing, memory_estimate, trainer
from masters.models.training.context import TrainContext
from masters.models.training.groups import Group, label_groups, plan_steps, response_groups
from masters.models.training.job import (
    Heartbeat,
    ModelsLoaded,
    RestartRequested,
    StudentExported,
    TokenBudgetLowered,
    TrainEvent,
    TrainingPlanned,
    TrainJob,
)
from masters.models.training.memory_estimate import PassSize
from masters.models.training.questions import QuestionPrompts
from masters.store import artifacts
from masters.store.artifacts import Artifact
from masters.store.storage import Storage


def main(job_file: Path) -> None:
    """Train as one rank, and export the student if that is rank 0."""
    job = TrainJob.model_validate_json(job_file.read_text())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world > 1 or job.sharding != "replicate":
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        rendezvous = f"file://{os.environ['MASTERS_RENDEZVOUS']}"
        dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=world)
    context = prepare(job, job_file, rank, world)
    trainer.fit(context)
    parameters = context.sharding.local_parameters(context.student)
    tensors = gather_to_rank0(context.sharding, parameters, parameters)
    if rank == 0:
        dropped = model_loading.export_student(tensors, job.student, job.out)
        context.report(StudentExported(dropped_settings=dropped))
    if dist.is_initialized():
        dist.destroy_process_group()


def prepare(job: TrainJob, job_file: Path, rank: int, world: int) -> TrainContext:
    """Load tables and models and plan the steps. Raises InputError if memory does not hold the models."""

    def report(event: TrainEvent) -> None:
        """Report an event from rank 0. Other ranks report what happens to themselves, else only that they are alive."""
        speaks = rank == 0 or isinstance(event, TokenBudgetLowered | RestartRequested)
        child_process.report_event(job_file, event if speaks else Heartbeat())

    storage, train = Storage(job.store), job.train
    data = artifacts.load(storage, job.tables["data"])
    prompts = QuestionPrompts(job.student, data, job_file.parent)
    groups, empty_responses = _load_groups(job, storage, data, prompts)
    steps = plan_steps(groups, len(job.ratios), train.epochs, train.questions_per_step, train.seed)
    planned = load_balancing.plan(steps, [load_balancing.size_of(group) for group in groups], job.token_budget, world)
    pass_facts = {} if planned is None else dict(passes=planned.passes, largest_pass=planned.largest_tokens)
    report(TrainingPlanned(groups=len(groups), steps=len(steps), empty_responses=empty_responses, planned=pass_facts))
    device = devices.select_device(rank, world)
    _check_memory(job, planned, groups, len(steps), device, world)
    sharding = make_sharding(job.sharding, device)
    student, teacher, reference = _load_models(job, device, sharding)
    weights_share = _weights_share(student, sharding)
    report(ModelsLoaded(processes=world, weights_share=weights_share, sharding=job.sharding))
    return TrainContext(
        student=student,
        teacher=teacher,
        remask=lambda stage: _remask(teacher, job, stage, sharding),
        family=family_of(AutoConfig.from_pretrained(job.student, trust_remote_code=False).model_type),
        train=train,
        rewards=job.rewards,
        groups=groups,
        steps=steps,
        ratios=job.ratios,
        question=prompts.question,
        storage=storage,
        checkpoints=job.checkpoints,
        checkpoint_steps=job.checkpoint_steps,
        token_budget=job.token_budget,
        report=report,
        reference=reference,
        end_tokens=_end_tokens(student, prompts.processor.tokenizer),
        vocabulary=vocabulary_size(prompts.processor.tokenizer),
        probe=[_label_question(prompts, ref) for ref in job.probe],
        rank=rank,
        world=world,
        sharding=sharding,
        part=job.part,
    )


def _load_groups(
    job: TrainJob, storage: Storage, data: Artifact, prompts: QuestionPrompts
) -> tuple[Sequence[Group], int]:
    """Return the groups to train on, and the number of empty responses that were left out."""
    if job.train.targets == "labels":
        rows = data.rows("questions", ["question_id", "answer"])
        answers = {row["question_id"]: prompts.label(row["answer"]) for row in rows}
        return label_groups(job.refs, answers, job.ratios, job.coverage), 0
    verdicts = artifacts.load(storage, job.tables["verdicts"]) if "verdicts" in job.tables else None
    responses = artifacts.load(storage, job.tables["responses"])
    return response_groups(job.refs, responses, verdicts, job.ratios, job.coverage, job.mask_stage, job.truncated)


def _check_memory(
    job: TrainJob,
    planned: load_balancing.Plan | None,
    groups: Sequence[Group],
    steps: int,
    device: str,
    world: int,
) -> None:
    """Raise InputError, before any model is loaded, if this machine does not have the memory that training needs."""
    available, sharing_ranks = memory_estimate.free_memory(device, world)
    if world > 1:
        dist.barrier()  # no rank loads a model before all ranks have measured
    tokens = planned.largest_tokens if planned else 0
    image_token = AutoConfig.from_pretrained(job.student, trust_remote_code=False).image_token_id
    image_tokens = sum(int((groups[g].prompt == image_token).sum()) for g in planned.largest) if planned else 0
    largest_pass = PassSize(tokens if device == "cpu" else flex_attention.round_up_to_block(tokens), image_tokens)
    saves = device == "cpu" and (steps > job.checkpoint_steps or bool(job.part.end_state))
    needed = memory_estimate.estimate_memory(
        job.student,
        None if job.train.objective == "sft" else job.teacher,
        job.train,
        largest_pass,
        world,
        saves,
        device,
        Runtime(sharding=job.sharding, activation_checkpointing=job.activation_checkpointing),
    )
    memory_estimate.check_memory(needed.on(device), available, sharing_ranks, device, largest_pass.tokens)


def _load_models(job: TrainJob, device: str, sharding: Sharding) -> tuple[VLM, VLM | None, VLM | None]:
    """Load student, teacher and pi_ref, one after the other, so that only one is whole in memory at a time.

    Teacher and pi_ref have the type of the products. pi_ref is the round's first student, also in a resumed run.
    """
    train = job.train
    shard_student = partial(sharding.shard_model, train=train)
    student = model_loading.load_model(job.student, train.dtype, device, shard_student)
    if job.activation_checkpointing:
        checkpoint_activations(student)

    def load_frozen(folder: Path) -> VLM:
        return model_loading.load_model(folder, mixed_precision.frozen_dtype(train), device, sharding.shard_model)

    teacher = None if train.objective == "sft" else load_frozen(job.teacher)
    reference = load_frozen(job.student) if train.holds_reference else None
    return student, teacher, reference


def _remask(teacher: VLM, job: TrainJob, stage: int, sharding: Sharding) -> None:
    """Mask the teacher in place for a mask stage."""
    model_loading.remask(teacher, job.teacher, job.thresholds[job.ratios[stage]], sharding)


def _end_tokens(student: VLM, tokenizer: Any) -> frozenset[int]:
    """Return the tokens at which an engine ends a response: the tokenizer's and those of the generation settings."""
    configured = student.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if token is not None)


def _weights_share(student: torch.nn.Module, sharding: Sharding) -> float:
    """Return the share of the student's weights that this rank holds."""
    parameters = sharding.local_parameters(student).values()
    local, total = (sum(p.numel() for p in tensors) for tensors in (map(to_local, parameters), parameters))
    return round(local / total, 4)


def _label_question(prompts: QuestionPrompts, ref: QuestionRef) -> Question:
    """Return a question whose only response is its label."""
    return Question(ref.question_id, prompts.prompt(ref), [prompts.label(prompts.row(ref)["answer"])])


if __name__ == "__main__":
    child_process.child_main(main)
