"""What a training run must not do: update weights by what is no number, or go on where the student falls.

The fall is seen on the probe; the best weights so far lie beside the checkpoints, under a name that says their step,
how many of the probe's questions they had right, and their SHA-256.
"""

import math
from collections.abc import Callable

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from masters.errors import ArtifactError, MastersError
from masters.identity import digest
from masters.models import losses
from masters.models.fitting import each_pass, within_memory
from masters.models.job import Job
from masters.models.packing import Pack, response_states
from masters.models.ranks import gathered

KEPT = 2  # best weights: the ones before are what a checkpoint older than the new ones goes on with


def gradient_size(model: torch.nn.Module) -> float:
    """The largest magnitude in a model's gradients; NaN if one is."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients, norm_type=math.inf).item()  # a sum of squares overflows sooner


def not_finite(job: Job, groups: list[int], loss_of: Callable[[int], torch.Tensor]) -> list[str]:
    """Which of these groups' questions, each by itself, have a loss or a gradient that is no finite number.

    Memory holds each: it held the passes of which they were part.
    """
    found = []
    for g in groups:
        job.student.zero_grad(set_to_none=True)
        loss = loss_of(g)
        loss.backward()
        if not (math.isfinite(loss.item()) and math.isfinite(gradient_size(job.student))):
            found.append(job.groups[g].ref.question_id)
    job.student.zero_grad(set_to_none=True)
    return found


@torch.no_grad()
def probe_right(job: Job) -> int:
    """Probe questions whose every label token (end token included) is the student's greedy choice."""

    def count() -> int:
        right: list[int] = []

        def look(_: list[None], packed: Pack) -> None:
            hit_U = response_states(job.student, packed).likeliest() == packed.token_U
            hit_T = hit_U[packed.distinct_T]
            right.append(int((losses.response_means(hit_T.float(), packed.response_T, packed.responses) == 1).sum()))

        each_pass(job, ((None, question) for question in job.probe), look)
        return sum(right)

    return within_memory(job, count)


class ProbeGuard:
    """Whether the student fell on the probe by more than `train.probe_drop` below its best, and the way back to it.

    With a guard a checkpoint is saved at every look, after the best weights: so a run that goes on from any checkpoint
    compares with what an undisturbed one does.
    """

    def __init__(self, job: Job, done: int) -> None:
        self.job, self.on = job, job.train.probe_drop is not None
        if not self.on:
            return
        if job.rank == 0:
            self._remove([name for name in self._names() if _step(name) > done])  # will be found again
        if done:
            self.step, self.right = max((_step(name), _right(name)) for name in self._names() if _step(name) <= done)
        else:
            self.step, self.right = 0, -1
            self.look(0)

    def look(self, number: int) -> tuple[float, bool]:
        """Accuracy on the probe after a step, and whether it fell. The best weights are kept; the later of equals.

        Raises MastersError at a fall where `train.on_drop` is "stop".
        """
        job = self.job
        right = gathered(job, probe_right(job))[0]  # one rank decides for all
        accuracy = right / max(1, len(job.probe))
        job.report(event="probe", step=number, accuracy=accuracy)
        if not self.on:
            return accuracy, False
        if right >= self.right:
            self.step, self.right = number, right
            self._keep()
        elif (self.right - right) / len(job.probe) > (job.train.probe_drop or 0.0):
            self._fell(number, accuracy)
            return accuracy, True
        return accuracy, False

    def roll_back(self) -> None:
        """The student's best weights put back."""
        name = next(name for name in self._names() if (_step(name), _right(name)) == (self.step, self.right))
        data = self.job.storage.read(name)
        if (now := digest(data)) not in name:
            raise ArtifactError(f"best weights {self.job.storage.uri(name)} are damaged: found SHA-256 {now}")
        tensors = load_safetensors(data)
        with torch.no_grad():
            for name, parameter in self.job.student.named_parameters():
                parameter.copy_(tensors[name])

    def _fell(self, number: int, accuracy: float) -> None:
        best = self.right / len(self.job.probe)
        if self.job.train.on_drop == "stop":
            raise MastersError(
                f"step {number}: the student has {accuracy:.1%} of {len(self.job.probe)} held-out training questions "
                f"right, after {best:.1%} at step {self.step}: a fall by more than train.probe_drop "
                f"({self.job.train.probe_drop}). Lower train.learning_rate, or set train.on_drop to rollback"
            )
        self.job.report(event="rolled_back", at=number, accuracy=accuracy, to=self.step, best=best)

    def _keep(self) -> None:
        if self.job.rank != 0:
            return
        tensors = {name: p.detach().contiguous() for name, p in self.job.student.named_parameters()}
        data = save_safetensors(tensors)
        name = f"best-{self.step:08d}-{self.right:04d}-{digest(data)}.safetensors"
        self.job.storage.write(f"{self.job.checkpoints}/{name}", data)
        self._remove(self._names()[:-KEPT])

    def _remove(self, names: list[str]) -> None:
        for name in names:
            self.job.storage.remove(name)

    def _names(self) -> list[str]:
        prefix = f"{self.job.checkpoints}/best-"
        return sorted(name for name in self.job.storage.names(self.job.checkpoints) if name.startswith(prefix))


def _step(name: str) -> int:
    return int(name.rsplit("-", 3)[1])


def _right(name: str) -> int:
    return int(name.rsplit("-", 2)[1])
