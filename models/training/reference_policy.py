"""The reference pass: log pi_ref of every response token, constants of a round (Eq. 8-11)."""

from dataclasses import replace

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from masters.common.errors import MastersError, StoreError
from masters.common.hashing import digest
from masters.data.question_shards import Ref
from masters.models.distributed.collectives import all_gather
from masters.models.losses import chunked_head
from masters.models.packing.packed_batch import PackedBatch, response_states
from masters.models.packing.prefix_tree import Question
from masters.models.training.context import TrainContext
from masters.models.training.oom_retry import DummyPass, each_pass, within_memory

KEPT = "reference-"  # beside the checkpoints, named after its SHA-256


@torch.no_grad()
def reference_log_probs(job: TrainContext) -> dict[int, torch.Tensor]:
    """log pi_ref of every response token, by group: constants, computed once with the round's first student.

    A question's groups (of several mask stages) are read together, questions in the order of the table, where those
    of one image lie together. The numbers are kept beside the checkpoints, so that a resumed run uses the very same.
    """
    if not all_gather(job.world, job.rank == 0 and _kept(job) is not None)[0]:  # one rank decides for all
        asked: dict[Ref, list[int]] = {}
        for g in sorted(range(len(job.groups)), key=lambda g: (job.groups[g].ref.file, job.groups[g].ref.row)):
            asked.setdefault(job.groups[g].ref, []).append(g)
        mine = list(asked.values())[len(asked) * job.rank // job.world : len(asked) * (job.rank + 1) // job.world]
        everyone = all_gather(job.world, _computed(job, mine, next(iter(asked.values()), [])))
        if job.rank == 0:
            data = _packed({group: values for part in everyone for group, values in part.items()})
            job.storage.write(f"{job.checkpoints}/{KEPT}{digest(data)}.safetensors", data)
        all_gather(job.world, None)  # no rank reads before it is written
    found = _kept(job)
    if found is None:
        raise StoreError(f"{job.storage.uri(job.checkpoints)}: the reference log-probabilities are gone")
    return _unpacked(found)


def _packed(found: dict[int, torch.Tensor]) -> bytes:
    """Of groups 0 to G - 1 in order. Not a tensor each: a safetensors file tells of little more than a million."""
    values = [found[group] for group in range(len(found))]
    return save_safetensors(dict(logp_T=torch.cat(values), tokens_G=torch.tensor([len(each) for each in values])))


def _unpacked(data: bytes) -> dict[int, torch.Tensor]:
    kept = load_safetensors(data)
    return dict(enumerate(kept["logp_T"].split(kept["tokens_G"].tolist())))


def _kept(job: TrainContext) -> bytes | None:
    """What was kept, if it is what its name says: a flipped bit would change the objective."""
    for name in job.storage.names(job.checkpoints):
        if name.startswith(f"{job.checkpoints}/{KEPT}") and digest(data := job.storage.read(name)) in name:
            return data
    return None


def _computed(job: TrainContext, asked: list[list[int]], spare: list[int]) -> dict[int, torch.Tensor]:
    """log pi_ref by group, of groups that are read together; `spare`: such groups, for passes of other ranks alone."""
    found: dict[int, torch.Tensor] = {}

    def log_probs(packed: PackedBatch) -> torch.Tensor:
        return job.sharding.within(
            job.student, lambda student: chunked_head.chosen_log_probs(response_states(student, packed), packed.token_U)
        )

    def read(parts: list[list[int]], packed: PackedBatch) -> None:
        logp_U = log_probs(packed)
        groups = [g for own in parts for g in own]
        lengths = [sum(len(r) for r in job.groups[g].responses) for g in groups]
        parts_T = [part.clone() for part in logp_U[packed.distinct_T].cpu().split(lengths)]
        bad = [
            job.groups[g].ref.question_id for g, part in zip(groups, parts_T, strict=True) if not part.isfinite().all()
        ]
        if bad:
            raise MastersError(
                f"reference log-probabilities of question {', '.join(dict.fromkeys(bad))} are no finite numbers: "
                "look at the question and at the student's weights"
            )
        found.update(zip(groups, parts_T, strict=True))
        job.report(event="reference", done=len(found) * job.world, of=len(job.groups))

    def rest() -> None:
        left = ((own, _together(job, own)) for own in asked if own[0] not in found)
        each_pass(job, left, read, DummyPass(lambda: _together(job, spare), log_probs))

    within_memory(job, rest)
    return found


def _together(job: TrainContext, groups: list[int]) -> Question:
    """A question with the responses of all its groups."""
    first = job.question(job.groups[groups[0]])
    return replace(first, responses=[r for g in groups for r in job.groups[g].responses])
