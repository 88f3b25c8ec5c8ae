"""What a training run must not do: update weights by what is no number, or go on where the student falls.

The fall is seen on the probe; the best weights so far lie beside the checkpoints, under a name that says their step,
how many of the probe's questions they had right, and their SHA-256.
"""

import math
from collections.abc import Callable, Iterable

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from masters.common.errors import ArtifactError, MastersError
from masters.common.hashing import digest
from masters.models.distributed import to_local
from masters.models.distributed.collectives import all_gather, broadcast_from_rank0, gather_to_rank0
from masters.models.losses import formulas
from masters.models.packing.packed_batch import PackedBatch, response_states
from masters.models.training.context import TrainContext
from masters.models.training.oom_retry import DummyPass, each_pass, within_memory
from masters.store.storage import Storage

KEPT = 3  # best weights: of either checkpoint, and of one that was on its way


def gradient_size(parameters: Iterable[torch.nn.Parameter]) -> float:
    """The largest magnitude in the gradients of what this rank holds; NaN if one is."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = [part for part in map(to_local, gradients) if part.numel()]
    return torch.nn.utils.get_total_norm(parts, norm_type=math.inf).item()  # a sum of squares overflows sooner


def largest_gradient(job: TrainContext) -> float:
    """The largest magnitude in the student's gradients, the same on all ranks; NaN if one is."""
    size = gradient_size(job.sharding.local_parameters(job.student).values())
    sizes = all_gather(job.world, size) if job.sharding.lockstep else [size]
    return math.nan if any(map(math.isnan, sizes)) else max(sizes)


def not_finite(job: TrainContext, groups: list[int], loss_of: Callable[[int], torch.Tensor]) -> list[str]:
    """Which of these groups' questions, each by itself, have a loss or a gradient that is no finite number.

    Memory holds each: it held the passes of which they were part.
    """
    found = []
    for g in groups:
        _forget_gradients(job)
        loss = loss_of(g)
        loss.backward()
        if job.sharding.lockstep:
            job.sharding.sum_gradients(job.student)
        if not (math.isfinite(loss.item()) and math.isfinite(largest_gradient(job))):
            found.append(job.groups[g].ref.question_id)
    _forget_gradients(job)
    return found


def _forget_gradients(job: TrainContext) -> None:
    for parameter in job.sharding.local_parameters(job.student).values():
        parameter.grad = None


@torch.no_grad()
def count_correct(job: TrainContext) -> int:
    """Probe questions whose every label token (end token included) is the student's greedy choice."""

    def count() -> int:
        right: list[int] = []

        def look(_: list[None], packed: PackedBatch) -> None:
            hit_T = (_greedy(job, packed) == packed.token_U)[packed.distinct_T]
            right.append(int((formulas.response_means(hit_T.float(), packed.response_T, packed.responses) == 1).sum()))

        # every rank looks at all of them
        spare = DummyPass(lambda: job.probe[0], lambda packed: _greedy(job, packed))
        each_pass(job, ((None, question) for question in job.probe), look, spare)
        return sum(right)

    return within_memory(job, count)


def _greedy(job: TrainContext, packed: PackedBatch) -> torch.Tensor:
    """The student's likeliest token for each distinct response token, [U]."""
    return job.sharding.within(job.student, lambda student: response_states(student, packed).likeliest())


class ValidationGuard:
    """Tell when the student falls on the probe by more than `train.max_validation_drop`, and restore its best weights.

    With a guard a checkpoint is saved at every look, after the best weights: so a run that goes on from any checkpoint
    compares with what an undisturbed one does.
    """

    def __init__(self, job: TrainContext, done: int) -> None:
        self.job, self.on = job, job.train.max_validation_drop is not None
        if not self.on:
            return
        if job.rank == 0:
            self._remove([name for name in self._names() if _step(name) > done])  # will be found again
        if done:
            kept = [name for name in self._everywhere() if _step(name) <= done]
            self.step, self.right = max((_step(name), _right(name)) for name in kept)
        else:
            self.step, self.right = 0, -1
            self.look(0)

    def look(self, number: int) -> tuple[float, bool]:
        """Accuracy on the probe after a step, and whether it fell. The best weights are kept; the later of equals.

        Raises MastersError at a fall where `train.on_drop` is "stop".
        """
        job = self.job
        right = all_gather(job.world, count_correct(job))[0]  # one rank decides for all
        accuracy = right / max(1, len(job.probe))
        job.report(event="probe", step=number, accuracy=accuracy)
        if not self.on:
            return accuracy, False
        if right >= self.right:
            self.step, self.right = number, right
            self._keep()
        elif (self.right - right) / len(job.probe) > (job.train.max_validation_drop or 0.0):
            self._fell(number, accuracy)
            return accuracy, True
        return accuracy, False

    def roll_back(self) -> None:
        """The student's best weights put back."""
        job, tensors = self.job, {}
        if job.rank == 0:
            name = self._best()
            data = job.storage.read(name)
            if (now := digest(data)) not in name:
                raise ArtifactError(f"best weights {job.storage.uri(name)} are damaged: found SHA-256 {now}")
            tensors = load_safetensors(data)
        held = job.sharding.local_parameters(job.student)
        with torch.no_grad():
            for name, whole in broadcast_from_rank0(tensors):
                held[name].copy_(job.sharding.shard(whole, held[name]))

    def hand_over(self, place: str) -> None:
        """Leave the best weights so far for the part of the round that follows, where they are watched."""
        if self.on and self.job.rank == 0:
            name = self._best()
            self.job.storage.copy(name, f"{place}/{name.rsplit('/', 1)[1]}")

    def _fell(self, number: int, accuracy: float) -> None:
        best = self.right / len(self.job.probe)
        if self.job.train.on_drop == "stop":
            raise MastersError(
                f"step {number}: the student has {accuracy:.1%} of {len(self.job.probe)} held-out training questions "
                f"right, after {best:.1%} at step {self.step}: a fall by more than train.max_validation_drop "
                f"({self.job.train.max_validation_drop}). Lower train.learning_rate, or set train.on_drop to rollback"
            )
        self.job.report(event="rolled_back", at=number, accuracy=accuracy, to=self.step, best=best)

    def _keep(self) -> None:
        held = self.job.sharding.local_parameters(self.job.student)
        tensors = gather_to_rank0(self.job.sharding, held, held)
        if self.job.rank != 0:
            return
        data = save_safetensors(tensors)
        name = f"best-{self.step:08d}-{self.right:04d}-{digest(data)}.safetensors"
        self.job.storage.write(f"{self.job.checkpoints}/{name}", data)
        self._remove(self._names()[:-KEPT])

    def _remove(self, names: list[str]) -> None:
        for name in names:
            self.job.storage.remove(name)

    def _best(self) -> str:
        """The file of the best weights."""
        return next(n for n in self._everywhere() if (_step(n), _right(n)) == (self.step, self.right))

    def _everywhere(self) -> list[str]:
        """Best weights of this training, and those that it was handed."""
        handed = self.job.part.handed_over
        return self._names() + (_best_in(self.job.storage, handed) if handed else [])

    def _names(self) -> list[str]:
        return _best_in(self.job.storage, self.job.checkpoints)


def _best_in(storage: Storage, prefix: str) -> list[str]:
    return sorted(name for name in storage.names(prefix) if name.startswith(f"{prefix}/best-"))


def _step(name: str) -> int:
    return int(name.rsplit("-", 3)[1])


def _right(name: str) -> int:
    return int(name.rsplit("-", 2)[1])
