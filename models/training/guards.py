"""Guards of a training run: stop at a loss or gradient that is not finite, and at a drop of validation accuracy.

Accuracy is measured on the probe questions. The best weights so far lie beside the checkpoints; the file name has their
step, how many probe questions they answered correctly, and their SHA-256.
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
from masters.models.training.job import ProbeMeasured, RolledBack
from masters.models.training.microbatches import DummyPass, run_passes
from masters.models.training.oom_retry import retry_smaller
from masters.store.storage import Storage

MAX_KEPT = 3  # best weights: one for each kept checkpoint, and one for a checkpoint that is not written yet


def gradient_size(parameters: Iterable[torch.nn.Parameter]) -> float:
    """Return the largest magnitude in the gradients that this rank holds; NaN if a gradient has a NaN."""
    gradients = [to_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    nonempty = [gradient for gradient in gradients if gradient.numel()]
    return torch.nn.utils.get_total_norm(nonempty, norm_type=math.inf).item()  # a sum of squares overflows sooner


def largest_gradient(context: TrainContext) -> float:
    """Return the largest magnitude in the student's gradients, the same on all ranks; NaN if a gradient has a NaN."""
    size = gradient_size(context.sharding.local_parameters(context.student).values())
    sizes = all_gather(context.world, size) if context.sharding.lockstep else [size]
    return math.nan if any(map(math.isnan, sizes)) else max(sizes)


def non_finite_questions(context: TrainContext, groups: list[int], loss_of: Callable[[int], torch.Tensor]) -> list[str]:
    """Return the ids of the questions of these groups whose loss or gradient, computed alone, is not finite.

    Memory suffices for each of them, as it did for the passes that they were part of.
    """
    found = []
    for g in groups:
        _clear_gradients(context)
        loss = loss_of(g)
        loss.backward()
        if context.sharding.lockstep:
            context.sharding.sum_gradients(context.student)
        if not (math.isfinite(loss.item()) and math.isfinite(largest_gradient(context))):
            found.append(context.groups[g].ref.question_id)
    _clear_gradients(context)
    return found


def _clear_gradients(context: TrainContext) -> None:
    for parameter in context.sharding.local_parameters(context.student).values():
        parameter.grad = None


@torch.no_grad()
def count_correct(context: TrainContext) -> int:
    """Return for how many probe questions every label token, end token included, is the greedy choice."""

    def count_all() -> int:
        counts: list[int] = []

        def count_batch(_: list[None], packed: PackedBatch) -> None:
            is_greedy_T = (_greedy_tokens(context, packed) == packed.token_U)[packed.distinct_T]
            share_R = formulas.response_means(is_greedy_T.float(), packed.response_T, packed.responses)
            counts.append(int((share_R == 1).sum()))

        # every rank counts all questions
        dummy = DummyPass(lambda: context.probe[0], lambda packed: _greedy_tokens(context, packed))
        run_passes(context, ((None, question) for question in context.probe), count_batch, dummy)
        return sum(counts)

    return retry_smaller(context, count_all)


def _greedy_tokens(context: TrainContext, packed: PackedBatch) -> torch.Tensor:
    """Return the student's most likely token in place of each distinct response token, [U]."""
    return context.sharding.run_with_full_weights(
        context.student, lambda student: response_states(student, packed, context.vocabulary).argmax()
    )


class ValidationGuard:
    """Ends training when probe accuracy drops by more than `train.max_validation_drop`, and restores the best weights.

    With the guard enabled, a checkpoint is saved at every validation, after the best weights. So a run that resumes
    from any checkpoint compares with the same weights as an uninterrupted run.
    """

    def __init__(self, context: TrainContext, steps_done: int) -> None:
        self.context, self.is_enabled = context, context.train.max_validation_drop is not None
        if not self.is_enabled:
            return
        if context.rank == 0:
            self._remove([name for name in self._own_files() if _step(name) > steps_done])  # they will be found again
        if steps_done:
            known = [name for name in self._all_files() if _step(name) <= steps_done]
            self.best_step, self.best_correct = max((_step(name), _correct(name)) for name in known)
        else:
            self.best_step, self.best_correct = 0, -1
            self.validate(0)

    def validate(self, number: int) -> tuple[float, bool]:
        """Measure probe accuracy after a step. Returns it, and whether the best weights are to be restored.

        Saves the weights if they are the best so far; of equally good ones the later are kept. Raises MastersError at a
        drop where `train.on_drop` is "stop".
        """
        context = self.context
        correct = all_gather(context.world, count_correct(context))[0]  # rank 0 decides for all
        accuracy = correct / max(1, len(context.probe))
        context.report(ProbeMeasured(step=number, accuracy=accuracy))
        if not self.is_enabled:
            return accuracy, False
        if correct >= self.best_correct:
            self.best_step, self.best_correct = number, correct
            self._save_weights()
        elif (self.best_correct - correct) / len(context.probe) > (context.train.max_validation_drop or 0.0):
            self._report_drop(number, accuracy)
            return accuracy, True
        return accuracy, False

    def roll_back(self) -> None:
        """Restore the student's best weights."""
        context, tensors = self.context, {}
        if context.rank == 0:
            name = self._best_file()
            data = context.storage.read(name)
            if (found := digest(data)) not in name:
                raise ArtifactError(f"best weights {context.storage.uri(name)} are damaged: found SHA-256 {found}")
            tensors = load_safetensors(data)
        parameters = context.sharding.local_parameters(context.student)
        with torch.no_grad():
            for name, tensor in broadcast_from_rank0(tensors):
                parameters[name].copy_(context.sharding.shard(tensor, parameters[name]))

    def copy_best_weights(self, prefix: str) -> None:
        """Copy the best weights so far to where the next part of the round starts from, if the guard is enabled."""
        if self.is_enabled and self.context.rank == 0:
            name = self._best_file()
            self.context.storage.copy(name, f"{prefix}/{name.rsplit('/', 1)[1]}")

    def _report_drop(self, number: int, accuracy: float) -> None:
        train, questions = self.context.train, len(self.context.probe)
        best = self.best_correct / questions
        if train.on_drop == "stop":
            raise MastersError(
                f"step {number}: the student answers {accuracy:.1%} of {questions} held-out training questions "
                f"correctly, after {best:.1%} at step {self.best_step}: a drop of more than train.max_validation_drop "
                f"({train.max_validation_drop}). Lower train.learning_rate, or set train.on_drop to rollback"
            )
        self.context.report(RolledBack(at=number, accuracy=accuracy, to=self.best_step, best=best))

    def _save_weights(self) -> None:
        context = self.context
        parameters = context.sharding.local_parameters(context.student)
        tensors = gather_to_rank0(context.sharding, parameters, parameters)
        if context.rank != 0:
            return
        data = save_safetensors(tensors)
        name = f"best-{self.best_step:08d}-{self.best_correct:04d}-{digest(data)}.safetensors"
        context.storage.write(f"{context.checkpoints}/{name}", data)
        self._remove(self._own_files()[:-MAX_KEPT])

    def _remove(self, names: list[str]) -> None:
        for name in names:
            self.context.storage.remove(name)

    def _best_file(self) -> str:
        best = (self.best_step, self.best_correct)
        return next(name for name in self._all_files() if (_step(name), _correct(name)) == best)

    def _all_files(self) -> list[str]:
        """Return the files of best weights: of this training, and those that the previous part of the round left."""
        start_state = self.context.part.start_state
        return self._own_files() + (_weight_files(self.context.storage, start_state) if start_state else [])

    def _own_files(self) -> list[str]:
        return _weight_files(self.context.storage, self.context.checkpoints)


def _weight_files(storage: Storage, prefix: str) -> list[str]:
    return sorted(name for name in storage.names(prefix) if name.startswith(f"{prefix}/best-"))


def _step(name: str) -> int:
    return int(name.rsplit("-", 3)[1])


def _correct(name: str) -> int:
    return int(name.rsplit("-", 2)[1])
