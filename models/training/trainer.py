"""The loop: masked teacher stage by stage, student behind it. Setup, reference pass, steps, export: free functions.

Everything is passed; nothing here knows MLflow, Prefect or the store's layout beyond the checkpoint names.
"""

import math
import time
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from masters.common.errors import MastersError
from masters.models.distributed.collectives import all_gather
from masters.models.losses import chunked_head
from masters.models.losses.chunked_head import Projection
from masters.models.losses.formulas import Terms
from masters.models.packing.packed_batch import PackedBatch, pack, response_states
from masters.models.packing.prefix_tree import Sizes
from masters.models.training import checkpoint, controls, diagnostics, objective, step_sums
from masters.models.training.context import TrainContext
from masters.models.training.gradient_clipping import clip_gradient
from masters.models.training.groups import Step
from masters.models.training.guards import ValidationGuard, largest_gradient, not_finite
from masters.models.training.history import drop_after
from masters.models.training.lr_schedule import learning_rate
from masters.models.training.microbatches import split_across_ranks
from masters.models.training.oom_retry import DummyPass, each_pass, one_step, within_memory
from masters.models.training.reference_policy import reference_log_probs
from masters.models.training.run_warnings import RunWarnings

NAMED = 5  # questions in an error
Taken = tuple[list[int], Sizes, dict[str, list[float]]]  # of a pass: its groups, its sizes, the ledger's columns


def fit(job: TrainContext) -> None:
    """Run all steps, from the last checkpoint if there is one; fewer where the student falls and is put back."""
    references = reference_log_probs(job) if job.train.stores_reference and job.groups else {}
    parameters = job.sharding.local_parameters(
        job.student
    )  # after passes: what these left whole would hide what is restored
    optimizer = torch.optim.AdamW(parameters.values(), lr=job.train.learning_rate, weight_decay=0.0)
    done = start(job, parameters, optimizer)
    guard = ValidationGuard(job, done)
    warnings = RunWarnings(job, done if job.rank == 0 else 0)  # of which rank 0 alone has the steps, and speaks
    stage, every, fell = None, max(1, job.round_steps // 10), False
    for number, step in enumerate(job.steps[done - job.part.steps_before :], done + 1):
        if step.stage != stage and job.teacher is not None:
            began, stage = time.monotonic(), step.stage
            job.remask(stage)
            job.report(event="remask", stage=stage, seconds=time.monotonic() - began)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(job.train, number, job.round_steps)
        with one_step(number):
            means = _take(job, number, step, references, optimizer)
        if job.rank == 0:
            warnings.look(number, means)
        last, probe = number == job.last_step, {}
        probed = number % every == 0 or number == job.round_steps
        if probed:
            probe["probe_accuracy"], fell = guard.look(number)
        if job.rank == 0:
            job.ledger.end(len(step.groups), means | probe)
        due = not (last or fell) and (number % job.checkpoint_steps == 0 or (probed and guard.on))
        if due or last or fell or job.ledger.full:
            job.ledger.write(job.storage, job.checkpoints, job.rank)
        if due:
            all_gather(job.world, None)  # every rank's rows are there before the checkpoint that they belong to
            checkpoint.save(job.storage, job.checkpoints, number, parameters, optimizer, job.sharding)
        if fell:
            guard.roll_back()
            break
    if job.part.hand_over and not fell:
        hand_over(job, parameters, optimizer, guard)
    job.report(event="packed", **asdict(sum(all_gather(job.world, job.tally), Sizes())))


def hand_over(
    job: TrainContext,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    guard: ValidationGuard,
) -> None:
    """Leave the state for the part of the round that follows, and the best weights where they are watched."""
    place = job.part.hand_over
    if job.rank == 0:
        for name in job.storage.names(place):  # of an attempt that ended before it was told
            job.storage.remove(name)
    checkpoint.save(job.storage, place, job.last_step, parameters, optimizer, job.sharding)
    guard.hand_over(place)


def _take(
    job: TrainContext, number: int, step: Step, references: dict[int, torch.Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, float]:
    """One optimizer step and its report. Returns the means over its questions. Raises before the update if a number
    is none."""
    began = time.monotonic()
    job.ledger.begin(number, step.epoch, step.stage, job.ratios[step.stage])
    sums = run_step(job, step, references)
    if not (math.isfinite(sums["loss"]) and math.isfinite(largest_gradient(job))):
        raise _no_number(job, number, step, references, sums["loss"])
    means = step_sums.means(sums, len(step.groups))
    means["learning_rate"] = optimizer.param_groups[0]["lr"]
    if job.train.max_gradient_norm is not None:
        means["gradient_norm"] = clip_gradient(job, job.train.max_gradient_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    told = dict(step=number, of=job.round_steps, stage=step.stage, epoch=step.epoch)
    job.report(event="step", **told, seconds=time.monotonic() - began, **means)
    return means


def run_step(job: TrainContext, step: Step, references: dict[int, torch.Tensor]) -> dict[str, float]:
    """Forward and backward of one step; gradients are of the mean over the step's questions on all processes."""
    mine = split_across_ranks(step.groups, job.sizes, job.world)[job.rank]
    sums, taken = within_memory(job, lambda: _passes(job, step, mine, references))
    for groups, sizes, responses in taken:
        job.ledger.responses([job.groups[g] for g in groups], responses)
        job.tally += sizes
    return reduced(job, sums)


def reduced(job: TrainContext, sums: dict[str, float]) -> dict[str, float]:
    """Sum gradients, already divided by the step's questions on all processes, and metrics over the processes."""
    job.sharding.sum_gradients(job.student)
    return step_sums.merged(all_gather(job.world, sums))


def _passes(
    job: TrainContext, step: Step, mine: list[int], references: dict[int, torch.Tensor]
) -> tuple[dict[str, float], list[Taken]]:
    """This rank's passes. Returns what they add up to (see `step_sums`), and what is kept of each pass."""
    smallest = min(step.groups, key=lambda g: job.sizes[g] or 0)
    sums: list[dict[str, float]] = []
    taken: list[Taken] = []

    def learn(groups: list[int], packed: PackedBatch) -> None:
        outcome = batch_outcome(job, packed, groups, references)
        (outcome.loss / len(step.groups)).backward()
        taken.append((groups, packed.sizes, outcome.responses))
        sums.append(outcome.sums)

    def idle(packed: PackedBatch) -> None:
        (batch_outcome(job, packed, [smallest], references).loss * 0).backward()

    spare = DummyPass(lambda: job.question(job.groups[smallest]), idle)
    each_pass(job, ((g, job.question(job.groups[g])) for g in mine), learn, spare)
    return step_sums.merged(sums), taken


def batch_outcome(
    job: TrainContext, packed: PackedBatch, groups: list[int], references: dict[int, torch.Tensor]
) -> objective.Outcome:
    """The objective of packed groups; `references` is empty where no log pi_ref was stored."""
    rewarded_R = _verdicts([controls.verdicts(job.groups[g], job.train) for g in groups])
    if job.teacher is None:
        logp_U = job.sharding.within(
            job.student, lambda student: chunked_head.chosen_log_probs(response_states(student, packed), packed.token_U)
        )
        return objective.supervised(
            logp_U[packed.distinct_T], packed, rewarded_R if job.train.targets == "responses" else None
        )
    terms = packed.spread(_terms(job, job.teacher, packed))
    tokens = diagnostics.token_sums(terms, packed, job.end_tokens)
    if job.train.objective == "kd":
        return _with(objective.distillation(terms, packed), tokens)
    if references:
        stored_T = torch.cat([references[g] for g in groups]).to(terms.logp_T.device)
        terms = replace(terms, reference_logp_T=stored_T)
    sources = [source for g in groups for source, *_ in job.groups[g].keys]
    rewards, taught_R = controls.rewards(job.rewards, job.train), torch.tensor([of == "teacher" for of in sources])
    outcome = objective.masters_loss(terms, rewarded_R, packed, job.train, rewards, taught_R)
    found_R = _verdicts([job.groups[g].scores for g in groups])  # also where a control rewards something else
    return _with(outcome, tokens | _reward_sums(outcome, terms, found_R, sources, packed))


def _verdicts(scores: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(scores)).float()


def _with(outcome: objective.Outcome, sums: dict[str, float]) -> objective.Outcome:
    """The outcome with further sums to log."""
    return replace(outcome, sums=outcome.sums | sums)


def _reward_sums(
    outcome: objective.Outcome, terms: Terms, score_R: torch.Tensor, sources: list[str], packed: PackedBatch
) -> dict[str, float]:
    """Diagnostics of the rewards: where they push, and whether they agree with the verdicts."""
    assert outcome.advantage_T is not None
    found = diagnostics.negative_sums(terms, outcome.advantage_T, packed)
    for name, column in (("distillation", "reward_distillation"), ("reward", "reward")):
        reward_R = torch.tensor(outcome.responses[column])
        found[f"{name}_agreement"], found[f"pairs_{name}"] = diagnostics.agreement(reward_R, score_R, packed)
    return found | diagnostics.log_pi_sums(terms, packed, score_R, sources)


def _terms(job: TrainContext, teacher: torch.nn.Module, packed: PackedBatch) -> Terms:
    """`head.terms` of distinct tokens, [U] each."""

    def frozen(model: torch.nn.Module) -> Projection:
        with torch.no_grad():
            return job.sharding.within(model, lambda whole: response_states(whole, packed))

    taught = frozen(teacher)
    reference = None if job.reference is None else frozen(job.reference)

    def compared(student: torch.nn.Module) -> tuple[Any, ...]:  # tensors in a tuple, as `Sharding.within` asks for
        states = response_states(student, packed)
        return tuple(vars(chunked_head.terms(states, taught, packed.token_U, job.train.divergence, reference)).values())

    return Terms(*job.sharding.within(job.student, compared))


def _no_number(
    job: TrainContext, number: int, step: Step, references: dict[int, torch.Tensor], loss: float
) -> MastersError:
    """What to say of a step whose loss or gradient is no finite number: each of its questions is taken again, alone."""
    gradient = largest_gradient(job)

    def loss_of(g: int) -> torch.Tensor:
        return batch_outcome(job, pack([job.question(job.groups[g])], job.student, job.family), [g], references).loss

    # where gradients are summed pass by pass, a question is alone if all ranks take it
    mine = (
        list(step.groups) if job.sharding.lockstep else split_across_ranks(step.groups, job.sizes, job.world)[job.rank]
    )
    everyone = all_gather(job.world, not_finite(job, mine, loss_of))
    found = list(dict.fromkeys(name for own in everyone for name in own))
    asked = found or [job.groups[g].ref.question_id for g in step.groups]
    names = ", ".join(asked[:NAMED]) + (f" and {len(asked) - NAMED} more" if len(asked) > NAMED else "")
    which = f"question{'s' * (len(asked) > 1)} {names}" if found else f"none of its questions alone ({names})"
    return MastersError(
        f"step {number}, mask stage {step.stage} (ratio {job.ratios[step.stage]}), {which}: the loss is "
        f"{loss / len(step.groups)}, the largest gradient {gradient}. No weight was changed by it: "
        "lower train.learning_rate, or look at the question"
    )


def start(job: TrainContext, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Go on from the newest good checkpoint, else from the state that the round's part before ended with.

    Returns the steps of the round that it has behind it, 0 without either. Raises ArtifactError if that state is not
    what was written.
    """
    found, refused = checkpoint.newest(job.storage, job.checkpoints) if job.rank == 0 else (None, [])
    for why in refused:
        job.report(event="refused_checkpoint", why=why)
    done = all_gather(job.world, found.step if found else 0)[0]  # one rank decides for all
    if job.rank == 0:
        # no rank writes before its first step is done, in which this one takes part
        drop_after(job.storage, job.checkpoints, done)
    if done:
        checkpoint.restore(found, parameters, optimizer, job.sharding)
        job.report(event="resumed", step=done, of=job.round_steps)
    elif job.part.handed_over:
        done = job.part.steps_before
        found = checkpoint.handed_over(job.storage, job.part.handed_over, done) if job.rank == 0 else None
        checkpoint.restore(found, parameters, optimizer, job.sharding)
    return done
