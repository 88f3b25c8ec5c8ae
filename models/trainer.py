"""The loop: masked teacher stage by stage, student behind it. Setup, reference pass, steps, export: free functions.

Everything is passed; nothing here knows MLflow, Prefect or the store's layout beyond the checkpoint names.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from masters.config import Rewards, Train
from masters.errors import MastersError
from masters.models import head, losses, objective, resume
from masters.models.families.base import Family
from masters.models.history import Ledger, drop_after
from masters.models.packing import Pack, batches, pack, response_logits, response_states
from masters.models.training_data import Group, Step
from masters.models.trees import Question
from masters.shards import Ref
from masters.storage import Storage

T = TypeVar("T")


@dataclass
class Job:
    """All that a training run needs. `question` makes a group ready to pack.

    `teacher` is None where the objective has none; `remask` masks it for a stage, in place, at that one of `ratios`.
    `token_budget`: tokens of a forward pass. `ledger` collects the rows of the tables.
    """

    student: torch.nn.Module
    teacher: torch.nn.Module | None
    remask: Callable[[int], None]
    family: Family
    train: Train
    rewards: Rewards
    groups: list[Group]
    steps: list[Step]
    ratios: list[float]
    question: Callable[[Group], Question]
    storage: Storage
    checkpoints: str  # prefix in the store
    checkpoint_steps: int
    token_budget: int
    report: Callable[..., None]
    probe: list[Question] = field(default_factory=list)
    rank: int = 0
    world: int = 1
    ledger: Ledger = field(default_factory=Ledger)


def fit(job: Job) -> None:
    """Run all steps, from the last checkpoint if there is one."""
    parameters = dict(job.student.named_parameters())
    optimiser = torch.optim.AdamW(parameters.values(), lr=job.train.learning_rate, weight_decay=0.0)
    references = reference_log_probs(job) if job.train.objective == "masters" and job.train.beta else {}
    done = start(job, parameters, optimiser)
    stage, every = None, max(1, len(job.steps) // 10)
    for number, step in enumerate(job.steps[done:], done + 1):
        if step.stage != stage and job.teacher is not None:
            began, stage = time.monotonic(), step.stage
            job.remask(stage)
            job.report(event="remask", stage=stage, seconds=time.monotonic() - began)
        began = time.monotonic()
        job.ledger.begin(number, step.epoch, step.stage, job.ratios[step.stage])
        sums = run_step(job, step, references)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        means = {name: value / len(step.groups) for name, value in sums.items()}
        job.report(
            event="step",
            step=number,
            of=len(job.steps),
            stage=step.stage,
            epoch=step.epoch,
            seconds=time.monotonic() - began,
            **means,
        )
        last, probe = number == len(job.steps), {}
        if number % every == 0 or last:
            probe = {"probe_accuracy": probe_accuracy(job)}
            job.report(event="probe", step=number, accuracy=probe["probe_accuracy"])
        if job.rank == 0:
            job.ledger.end(len(step.groups), means | probe)
        due = number % job.checkpoint_steps == 0 and not last
        if due or last or job.ledger.full:
            job.ledger.write(job.storage, job.checkpoints, job.rank)
        if due:
            _gathered(job, None)  # every rank's rows are there before the checkpoint that they belong to
            if job.rank == 0:
                resume.save(job.storage, job.checkpoints, number, parameters, optimiser)


def run_step(job: Job, step: Step, references: dict[int, torch.Tensor]) -> dict[str, float]:
    """Forward and backward of one step; gradients are of the mean over the step's questions on all processes."""
    mine = step.groups[job.rank :: job.world]
    sums: dict[str, float] = {}
    for groups, packed in _packs(job, ((g, job.question(job.groups[g])) for g in mine)):
        outcome = batch_outcome(job, packed, groups, references)
        if not torch.isfinite(outcome.loss):
            raise MastersError(f"the loss is {outcome.loss.item()} in stage {step.stage}: lower train.learning_rate")
        (outcome.loss / len(step.groups)).backward()
        job.ledger.responses([job.groups[g] for g in groups], outcome.responses)
        sums = {name: sums.get(name, 0.0) + value for name, value in outcome.sums.items()}
    if job.world > 1:
        sums = _reduce(job, sums)
    return sums


def batch_outcome(job: Job, packed: Pack, groups: list[int], references: dict[int, torch.Tensor]) -> objective.Outcome:
    """The objective of packed groups; `references` is empty where log pi_ref has no part in it."""
    student = response_states(job.student, packed)
    if job.teacher is None:
        return objective.supervised(head.chosen_log_probs(student, packed.token_U)[packed.distinct_T], packed)
    with torch.no_grad():
        taught = response_states(job.teacher, packed)
    terms = packed.spread(head.terms(student, taught, packed.token_U, job.train.divergence))
    if job.train.objective == "kd":
        return objective.distillation(terms, packed)
    reference_T = torch.cat([references[g] for g in groups]).to(terms.logp_T.device) if references else None
    score_R = torch.from_numpy(np.concatenate([job.groups[g].scores for g in groups])).float()
    return objective.masters(terms, reference_T, score_R, packed, job.train, job.rewards)


@torch.no_grad()
def reference_log_probs(job: Job) -> dict[int, torch.Tensor]:
    """log pi_ref of every response token, by group: constants, computed once with the round's first student.

    A question's groups (of several mask stages) are read together, questions in the order of the table, where those
    of one image lie together. The numbers are kept beside the checkpoints, so that a resumed run uses the very same.
    """
    name = f"{job.checkpoints}/reference.safetensors"
    if not job.storage.exists(name):
        asked: dict[Ref, list[int]] = {}
        for g in sorted(range(len(job.groups)), key=lambda g: (job.groups[g].ref.file, job.groups[g].ref.row)):
            asked.setdefault(job.groups[g].ref, []).append(g)
        mine = list(asked.values())[len(asked) * job.rank // job.world : len(asked) * (job.rank + 1) // job.world]
        found: dict[str, torch.Tensor] = {}
        for parts, packed in _packs(job, ((own, _together(job, own)) for own in mine)):
            logp_U = head.chosen_log_probs(response_states(job.student, packed), packed.token_U)
            groups = [g for own in parts for g in own]
            lengths = [sum(len(r) for r in job.groups[g].responses) for g in groups]
            logp_T = logp_U[packed.distinct_T].cpu()
            found |= dict(zip(map(str, groups), (part.clone() for part in logp_T.split(lengths)), strict=True))
            job.report(event="reference", done=len(found) * job.world, of=len(job.groups))
        everyone = _gathered(job, found)
        if job.rank == 0:
            job.storage.create(name, save_safetensors({group: part[group] for part in everyone for group in part}))
        _gathered(job, None)  # no rank reads before it is written
    return {int(group): values for group, values in load_safetensors(job.storage.read(name)).items()}


def _together(job: Job, groups: list[int]) -> Question:
    """A question with the responses of all its groups."""
    first = job.question(job.groups[groups[0]])
    return replace(first, responses=[r for g in groups for r in job.groups[g].responses])


def _packs(job: Job, asked: Iterable[tuple[T, Question]]) -> Iterator[tuple[list[T], Pack]]:
    """Questions with what they are called, packed within the token budget."""
    for batch in batches(asked, job.token_budget):
        names, questions = zip(*batch, strict=True)
        yield list(names), pack(list(questions), job.student, job.family, job.token_budget)


@torch.no_grad()
def probe_accuracy(job: Job) -> float:
    """Share of probe questions whose every label token (end token included) is the student's greedy choice."""
    right = 0
    for _, packed in _packs(job, ((q.question_id, q) for q in job.probe)):
        hit_T = response_logits(job.student, packed).argmax(-1) == packed.token_T
        right += int((losses.response_means(hit_T.float(), packed.response_T, packed.responses) == 1).sum())
    return right / max(1, len(job.probe))


def start(job: Job, parameters: dict[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer) -> int:
    """Go on from the newest good checkpoint. Returns the steps it has behind it, 0 without one."""
    found, refused = resume.newest(job.storage, job.checkpoints) if job.rank == 0 else (None, [])
    for why in refused:
        job.report(event="refused_checkpoint", why=why)
    name = _gathered(job, found and found.name)[0]  # one rank decides for all
    checkpoint = found or (resume.read(job.storage, name) if name else None)
    done = checkpoint.step if checkpoint else 0
    if job.rank == 0:
        # no rank writes before its first step is done, in which this one takes part
        drop_after(job.storage, job.checkpoints, done)
    if checkpoint:
        resume.restore(checkpoint, parameters, optimiser)
        job.report(event="resumed", step=done, of=len(job.steps))
    return done


def _reduce(job: Job, sums: dict[str, float]) -> dict[str, float]:
    """Sum gradients and metrics over the processes: each already divided by the step's questions on all of them."""
    parameters = list(job.student.parameters())
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)  # all at once: a message a parameter costs more than the step of a small model
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    everyone = _gathered(job, sums)
    return {name: sum(one.get(name, 0.0) for one in everyone) for one in everyone for name in one}


def _gathered(job: Job, own: T) -> list[T]:
    """What every process has, in order of rank, on all of them."""
    if job.world == 1:
        return [own]
    everyone = [own] * job.world
    dist.all_gather_object(everyone, own)
    return everyone
