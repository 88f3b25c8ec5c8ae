"""Log pi_ref of every response token, computed once a round with the student that the round starts from (Eq. 8-11).

Shapes: T response tokens, G groups, U distinct response tokens of a pass.
"""

from dataclasses import replace

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from masters.common.errors import MastersError, StoreError
from masters.common.hashing import digest
from masters.data.question_shards import QuestionRef
from masters.models.distributed.collectives import all_gather
from masters.models.losses import chunked_head
from masters.models.packing.packed_batch import PackedBatch, response_states
from masters.models.packing.prefix_tree import Question
from masters.models.training.context import TrainContext
from masters.models.training.job import ReferenceProgress
from masters.models.training.microbatches import DummyPass, run_passes
from masters.models.training.oom_retry import retry_smaller

FILE_PREFIX = "reference-"  # of the file beside the checkpoints; its SHA-256 follows


@torch.no_grad()
def reference_log_probs(context: TrainContext) -> dict[int, torch.Tensor]:
    """Log pi_ref of every response token, by group.

    The groups of a question (at several mask stages) are computed together. Questions are in the order of the table,
    where those about one image are neighbors. The result is stored beside the checkpoints, so that a resumed run uses
    the same numbers.
    """
    is_stored = context.rank == 0 and _read_stored(context) is not None
    if not all_gather(context.world, is_stored)[0]:  # rank 0 decides for all
        questions = _groups_by_question(context)
        begin, end = (len(questions) * rank // context.world for rank in (context.rank, context.rank + 1))
        by_rank = all_gather(context.world, _compute(context, questions[begin:end], questions[0]))
        if context.rank == 0:
            data = _encode({group: logp_T for part in by_rank for group, logp_T in part.items()})
            context.storage.write(f"{context.checkpoints}/{FILE_PREFIX}{digest(data)}.safetensors", data)
        all_gather(context.world, None)  # waits until the file is written
    data = _read_stored(context)
    if data is None:
        raise StoreError(f"{context.storage.uri(context.checkpoints)}: the reference log-probabilities are missing")
    return _decode(data)


def _groups_by_question(context: TrainContext) -> list[list[int]]:
    """Return the groups of each question, in the order of the questions table."""
    by_question: dict[QuestionRef, list[int]] = {}
    for g in sorted(range(len(context.groups)), key=lambda g: (context.groups[g].ref.file, context.groups[g].ref.row)):
        by_question.setdefault(context.groups[g].ref, []).append(g)
    return list(by_question.values())


def _encode(logp_by_group: dict[int, torch.Tensor]) -> bytes:
    """Return a safetensors file of groups 0 to G - 1: one tensor for all, as the format holds about a million."""
    values = [logp_by_group[group] for group in range(len(logp_by_group))]
    lengths_G = torch.tensor([len(logp_T) for logp_T in values])
    return save_safetensors(dict(logp_T=torch.cat(values), tokens_G=lengths_G))


def _decode(data: bytes) -> dict[int, torch.Tensor]:
    stored = load_safetensors(data)
    return dict(enumerate(stored["logp_T"].split(stored["tokens_G"].tolist())))


def _read_stored(context: TrainContext) -> bytes | None:
    """Return the stored file, if it has the SHA-256 in its name: a flipped bit would change the objective."""
    for name in context.storage.names(context.checkpoints):
        is_reference = name.startswith(f"{context.checkpoints}/{FILE_PREFIX}")
        if is_reference and digest(data := context.storage.read(name)) in name:
            return data
    return None


def _compute(context: TrainContext, questions: list[list[int]], dummy_groups: list[int]) -> dict[int, torch.Tensor]:
    """Log pi_ref by group, for questions given as their groups. `dummy_groups`: a question for dummy passes."""
    logp_by_group: dict[int, torch.Tensor] = {}

    def log_probs(packed: PackedBatch) -> torch.Tensor:
        return context.sharding.run_with_full_weights(
            context.student,
            lambda student: chunked_head.chosen_log_probs(
                response_states(student, packed, context.vocabulary), packed.token_U
            ),
        )

    def compute_batch(batch: list[list[int]], packed: PackedBatch) -> None:
        logp_T = log_probs(packed)[packed.distinct_T].cpu()
        groups = [g for question_groups in batch for g in question_groups]
        lengths = [sum(map(len, context.groups[g].responses)) for g in groups]
        found = {g: part_T.clone() for g, part_T in zip(groups, logp_T.split(lengths), strict=True)}
        non_finite = [context.groups[g].ref.question_id for g, part_T in found.items() if not part_T.isfinite().all()]
        if non_finite:
            raise MastersError(
                f"reference log-probabilities of question {', '.join(dict.fromkeys(non_finite))} are not finite: "
                "look at the question and at the student's weights"
            )
        logp_by_group.update(found)
        context.report(ReferenceProgress(done=len(logp_by_group) * context.world, total=len(context.groups)))

    def compute_rest() -> None:
        rest = ((groups, _join_groups(context, groups)) for groups in questions if groups[0] not in logp_by_group)
        run_passes(context, rest, compute_batch, DummyPass(lambda: _join_groups(context, dummy_groups), log_probs))

    retry_smaller(context, compute_rest)
    return logp_by_group


def _join_groups(context: TrainContext, groups: list[int]) -> Question:
    """Return a question with the responses of all its groups."""
    first = context.question(context.groups[groups[0]])
    return replace(first, responses=[response for g in groups for response in context.groups[g].responses])
