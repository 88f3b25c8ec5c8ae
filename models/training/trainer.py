"""Training loop: passes, optimizer steps, checkpoints and progress events, as free functions on a `TrainContext`.

Nothing here knows MLflow, Prefect or the store's layout beyond the names of checkpoints.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from masters.common.errors import MastersError
from masters.models.distributed.collectives import all_gather
from masters.models.losses import chunked_head
from masters.models.losses.chunked_head import Projection
from masters.models.losses.formulas import Terms
from masters.models.packing.packed_batch import PackedBatch, pack, response_states
from masters.models.packing.prefix_tree import TokenCounts
from masters.models.training import checkpoint, diagnostics, negative_controls, objective, step_metrics
from masters.models.training.context import TrainContext
from masters.models.training.gradient_clipping import clip_gradient
from masters.models.training.groups import Step
from masters.models.training.guards import ValidationGuard, largest_gradient, non_finite_questions
from masters.models.training.history import drop_after
from masters.models.training.job import CheckpointRefused, PassesPacked, StepFinished, TeacherMasked, TrainingResumed
from masters.models.training.load_balancing import split_across_ranks
from masters.models.training.lr_schedule import learning_rate
from masters.models.training.microbatches import DummyPass, run_passes
from masters.models.training.oom_retry import retry_smaller, step_memory_errors
from masters.models.training.reference_policy import reference_log_probs
from masters.models.training.run_warnings import RunWarnings

MAX_NAMED = 5  # questions named in an error message
References = dict[int, torch.Tensor]  # stored log pi_ref of the response tokens, by group


@dataclass(frozen=True)
class PassResult:
    """Result of one training pass: its groups, token counts, sums to log and columns of the table `rewards`."""

    groups: list[int]
    token_counts: TokenCounts
    sums: dict[str, float]
    responses: dict[str, list[float]]


def fit(context: TrainContext) -> None:
    """Train from the newest checkpoint to the last step, or until the validation guard rolls back."""
    references = reference_log_probs(context) if context.train.stores_reference and context.groups else {}
    # after the reference pass, which may leave gathered weights in the model where FSDP2 expects local ones
    parameters = context.sharding.local_parameters(context.student)
    optimizer = torch.optim.AdamW(parameters.values(), lr=context.train.learning_rate, weight_decay=0.0)
    steps_done = restore_state(context, parameters, optimizer)
    guard = ValidationGuard(context, steps_done)
    warnings = RunWarnings(context, steps_done if context.rank == 0 else 0)  # only rank 0 has the history, and reports
    validation_interval = max(1, context.round_steps // 10)
    stage, rolls_back = None, False
    for number, step in enumerate(context.steps[steps_done - context.part.steps_before :], steps_done + 1):
        if step.stage != stage and context.teacher is not None:
            stage = step.stage
            _mask_teacher(context, stage)
        with step_memory_errors(number):
            means = _take_step(context, number, step, references, optimizer)
        if context.rank == 0:
            warnings.add_step(number, means)
        validates = number % validation_interval == 0 or number == context.round_steps
        if validates:
            means["probe_accuracy"], rolls_back = guard.validate(number)
        if context.rank == 0:
            context.history.end_step(len(step.groups), means)
        ends = rolls_back or number == context.last_step
        saves = not ends and (number % context.checkpoint_steps == 0 or (validates and guard.is_enabled))
        if saves or ends or context.history.is_full:
            context.history.write(context.storage, context.checkpoints, context.rank)
        if saves:
            all_gather(context.world, None)  # waits for the history of all ranks, which the checkpoint refers to
            checkpoint.save(context.storage, context.checkpoints, number, parameters, optimizer, context.sharding)
        if rolls_back:
            guard.roll_back()
            break
    if context.part.end_state and not rolls_back:
        save_end_state(context, parameters, optimizer, guard)
    context.report(PassesPacked(**asdict(sum(all_gather(context.world, context.token_counts), TokenCounts()))))


def restore_state(
    context: TrainContext, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> int:
    """Restore the newest valid checkpoint, else the state that the previous part of the round ended with.

    Returns the number of the round's steps that are done, 0 without either. Raises ArtifactError if that state is not
    what was written.
    """
    found, refused = checkpoint.newest(context.storage, context.checkpoints) if context.rank == 0 else (None, [])
    for reason in refused:
        context.report(CheckpointRefused(reason=reason))
    steps_done = all_gather(context.world, found.step if found else 0)[0]  # rank 0 decides for all
    if context.rank == 0:
        # no other rank writes before its first step, which rank 0 takes part in
        drop_after(context.storage, context.checkpoints, steps_done)
    if steps_done:
        checkpoint.restore(found, parameters, optimizer, context.sharding)
        context.report(TrainingResumed(step=steps_done, total=context.round_steps))
    elif context.part.start_state:
        steps_done = context.part.steps_before
        if context.rank == 0:
            found = checkpoint.read_end_state(context.storage, context.part.start_state, steps_done)
        checkpoint.restore(found, parameters, optimizer, context.sharding)
    return steps_done


def save_end_state(
    context: TrainContext,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    guard: ValidationGuard,
) -> None:
    """Save the state that the next part of the round starts from, and the best weights if the guard keeps them."""
    prefix = context.part.end_state
    if context.rank == 0:
        for name in context.storage.names(prefix):  # left by an attempt that was interrupted here
            context.storage.remove(name)
    checkpoint.save(context.storage, prefix, context.last_step, parameters, optimizer, context.sharding)
    guard.copy_best_weights(prefix)


def _mask_teacher(context: TrainContext, stage: int) -> None:
    began = time.monotonic()
    context.remask(stage)
    context.report(TeacherMasked(stage=stage, seconds=time.monotonic() - began))


def _take_step(
    context: TrainContext, number: int, step: Step, references: References, optimizer: torch.optim.Optimizer
) -> dict[str, float]:
    """Take one optimizer step and report it. Returns the means over its questions.

    Raises MastersError before the update if the loss or a gradient is not finite.
    """
    began = time.monotonic()
    for parameter_group in optimizer.param_groups:
        parameter_group["lr"] = learning_rate(context.train, number, context.round_steps)
    context.history.begin_step(number, step.epoch, step.stage, context.ratios[step.stage])
    sums = run_step(context, step, references)
    if not (math.isfinite(sums["loss"]) and math.isfinite(largest_gradient(context))):
        raise _non_finite_error(context, number, step, references, sums["loss"])
    means = step_metrics.means(sums, len(step.groups))
    means["learning_rate"] = optimizer.param_groups[0]["lr"]
    if context.train.max_gradient_norm is not None:
        means["gradient_norm"] = clip_gradient(context, context.train.max_gradient_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds = time.monotonic() - began
    context.report(
        StepFinished(
            step=number,
            total=context.round_steps,
            stage=step.stage,
            epoch=step.epoch,
            seconds=seconds,
            means=dict(means),
        )
    )
    return means


def run_step(context: TrainContext, step: Step, references: References) -> dict[str, float]:
    """Run forward and backward passes of one step on all ranks. Returns what `step_metrics` describes.

    Gradients are those of the mean over the step's questions on all ranks.
    """
    rank_groups = split_across_ranks(step.groups, context.group_tokens, context.world)[context.rank]
    results = retry_smaller(context, lambda: _forward_backward(context, step, rank_groups, references))
    for result in results:
        context.history.add_responses([context.groups[g] for g in result.groups], result.responses)
        context.token_counts += result.token_counts
    return sum_over_ranks(context, step_metrics.merge(result.sums for result in results))


def sum_over_ranks(context: TrainContext, sums: dict[str, float]) -> dict[str, float]:
    """Sum gradients, already divided by the step's questions on all ranks, and metrics over the ranks."""
    context.sharding.sum_gradients(context.student)
    return step_metrics.merge(all_gather(context.world, sums))


def _forward_backward(
    context: TrainContext, step: Step, rank_groups: list[int], references: References
) -> list[PassResult]:
    """Run this rank's forward and backward passes of a step."""
    results: list[PassResult] = []
    smallest = min(step.groups, key=lambda g: context.group_tokens[g] or 0)

    def train(groups: list[int], packed: PackedBatch) -> None:
        outcome = batch_outcome(context, packed, groups, references)
        (outcome.loss / len(step.groups)).backward()
        results.append(PassResult(groups, packed.token_counts, outcome.sums, outcome.responses))

    def train_on_nothing(packed: PackedBatch) -> None:
        (batch_outcome(context, packed, [smallest], references).loss * 0).backward()

    questions = ((g, context.question(context.groups[g])) for g in rank_groups)
    run_passes(
        context, questions, train, DummyPass(lambda: context.question(context.groups[smallest]), train_on_nothing)
    )
    return results


def batch_outcome(
    context: TrainContext, packed: PackedBatch, groups: list[int], references: References
) -> objective.Outcome:
    """Compute the objective on packed groups. `references` is empty if no log pi_ref is stored."""
    target_R = _concatenate(negative_controls.verdicts(context.groups[g], context.train) for g in groups)
    is_trained_R = torch.from_numpy(np.concatenate([context.groups[g].is_trained for g in groups]))
    if context.teacher is None:
        logp_U = context.sharding.run_with_full_weights(
            context.student,
            lambda student: chunked_head.chosen_log_probs(
                response_states(student, packed, context.vocabulary), packed.token_U
            ),
        )
        score_R = target_R if context.train.targets == "responses" else None
        return objective.supervised(logp_U[packed.distinct_T], packed, score_R, is_trained_R)
    terms = packed.expand(_terms(context, context.teacher, packed))
    token_sums = diagnostics.token_sums(terms, packed, context.end_tokens)
    if context.train.objective == "kd":
        outcome = objective.distillation(terms, packed, is_trained_R)
        return replace(outcome, sums=outcome.sums | token_sums)
    if references:
        stored_T = torch.cat([references[g] for g in groups]).to(terms.logp_T.device)
        terms = replace(terms, reference_logp_T=stored_T)
    sources = [source for g in groups for source, *_ in context.groups[g].keys]
    by_teacher_R = torch.tensor([source == "teacher" for source in sources])
    rewards = negative_controls.rewards(context.rewards, context.train)
    outcome = objective.masters_loss(terms, target_R, packed, context.train, rewards, by_teacher_R, is_trained_R)
    # the diagnostics compare with the real verdicts, also where a control trains on others
    score_R = _concatenate(context.groups[g].scores for g in groups)
    reward_sums = _reward_sums(outcome, terms, score_R, sources, packed)
    return replace(outcome, sums=outcome.sums | token_sums | reward_sums)


def _concatenate(scores: Iterable[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(list(scores))).float()


def _reward_sums(
    outcome: objective.Outcome, terms: Terms, score_R: torch.Tensor, sources: list[str], packed: PackedBatch
) -> dict[str, float]:
    """Return diagnostics of the rewards: which tokens they push down, and whether they agree with the verdicts."""
    assert outcome.advantage_T is not None
    sums = diagnostics.negative_sums(terms, outcome.advantage_T, packed)
    for name, column in (("distillation", "reward_distillation"), ("reward", "reward")):
        reward_R = torch.tensor(outcome.responses[column])
        sums[f"{name}_agreement"], sums[f"pairs_{name}"] = diagnostics.agreement(reward_R, score_R, packed)
    return sums | diagnostics.log_pi_sums(terms, packed, score_R, sources)


def _terms(context: TrainContext, teacher: torch.nn.Module, packed: PackedBatch) -> Terms:
    """Return `chunked_head.token_terms` of the distinct response tokens, [U] each."""

    def frozen_states(model: torch.nn.Module) -> Projection:
        with torch.no_grad():
            return context.sharding.run_with_full_weights(
                model, lambda gathered: response_states(gathered, packed, context.vocabulary)
            )

    teacher_states = frozen_states(teacher)
    reference_states = None if context.reference is None else frozen_states(context.reference)

    def student_terms(student: torch.nn.Module) -> tuple[Any, ...]:  # `run_with_full_weights` needs a tuple of tensors
        states = response_states(student, packed, context.vocabulary)
        terms = chunked_head.token_terms(
            states, teacher_states, packed.token_U, context.train.divergence, reference_states
        )
        return tuple(vars(terms).values())

    return Terms(*context.sharding.run_with_full_weights(context.student, student_terms))


def _non_finite_error(
    context: TrainContext, number: int, step: Step, references: References, loss: float
) -> MastersError:
    """Return the error for a step whose loss or gradient is not finite, with the questions that cause it alone."""
    gradient = largest_gradient(context)

    def loss_of(g: int) -> torch.Tensor:
        packed = pack([context.question(context.groups[g])], context.student, context.family)
        return batch_outcome(context, packed, [g], references).loss

    # where every pass sums gradients over ranks, all ranks must compute the same question
    rank_groups = split_across_ranks(step.groups, context.group_tokens, context.world)[context.rank]
    checked = list(step.groups) if context.sharding.lockstep else rank_groups
    by_rank = all_gather(context.world, non_finite_questions(context, checked, loss_of))
    found = list(dict.fromkeys(name for names in by_rank for name in names))
    names = found or [context.groups[g].ref.question_id for g in step.groups]
    listed = ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")
    cause = f"question{'s' * (len(names) > 1)} {listed}" if found else f"none of its questions alone ({listed})"
    return MastersError(
        f"step {number}, mask stage {step.stage} (ratio {context.ratios[step.stage]}), {cause}: the loss is "
        f"{loss / len(step.groups)}, the largest gradient {gradient}. No weight was changed by it: "
        "lower train.learning_rate, or look at the question"
    )
