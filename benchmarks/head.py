"""`python -m benchmarks head`: log-probabilities and divergence of response tokens over a real vocabulary.

Baselines: all logits at once (`losses.formulas`); TRL's divergence function on all logits; Liger's chunked loss. The
latter two return one number for all tokens, from which no reward can be computed; they are timed for what they return.
Shape suffixes T, V, H as in `masters.models.losses.chunked_head`. Forward and backward, in float32 on a CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.measure import Row, compare, make_gpu_memory_meter, make_memory_meter, make_timer
from masters.models.losses import chunked_head, formulas
from masters.models.losses.chunked_head import Projection

REPEATS = 3


@dataclass(frozen=True)
class Sizes:
    """Response tokens, vocabulary, the models' hidden sizes; device and data type of the tensors."""

    tokens: int = 1024
    vocabulary: int = 151_936
    student: int = 1024
    teacher: int = 2048
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


Loss = Callable[[Projection, Projection, torch.Tensor], torch.Tensor]


def measure(sizes: Sizes = Sizes()) -> list[Row]:
    """Return rows of time and memory against each baseline."""
    baselines = {"dense": dense_loss, "TRL": trl_loss, "Liger": liger_loss}
    timer = make_timer(prepare_pass(chunked_loss, sizes))
    rows = [
        compare(f"time, {name}", "s", timer, make_timer(prepare_pass(loss, sizes)), REPEATS)
        for name, loss in baselines.items()
    ]
    return rows + [
        compare(f"memory, {name}", "MiB", make_meter(chunked_loss, sizes), make_meter(loss, sizes), 1)
        for name, loss in baselines.items()
    ]


def make_meter(loss: Loss, sizes: Sizes) -> Callable[[], float]:
    """Return a function that measures MiB: those that a pass adds on a CPU, all of them on a GPU."""
    prepare = partial(prepare_pass, loss, sizes)
    return make_memory_meter(prepare) if sizes.device == "cpu" else make_gpu_memory_meter(lambda: prepare()())


def prepare_pass(loss: Loss, sizes: Sizes) -> Callable[[], None]:
    """Return one forward and backward pass on random states. Gradients exist before, so their memory does not count."""
    torch.manual_seed(0)
    options: Any = dict(device=sizes.device, dtype=sizes.dtype)
    student, teacher = (
        Projection(
            torch.randn(sizes.tokens, width, **options), torch.randn(sizes.vocabulary, width, **options) / width**0.5
        )
        for width in (sizes.student, sizes.teacher)
    )
    token_T = torch.randint(sizes.vocabulary, (sizes.tokens,), device=sizes.device)
    for tensor in (student.hidden_TH, student.weight_VH):
        tensor.requires_grad_()
        tensor.grad = torch.ones_like(tensor)

    def run_pass() -> None:
        student.hidden_TH.grad = student.weight_VH.grad = None
        loss(student, teacher, token_T).backward()

    return run_pass


def chunked_loss(student: Projection, teacher: Projection, token_T: torch.Tensor) -> torch.Tensor:
    terms = chunked_head.token_terms(student, teacher, token_T, "jsd")
    return (terms.divergence_T - terms.logp_T).mean()


def dense_loss(student: Projection, teacher: Projection, token_T: torch.Tensor) -> torch.Tensor:
    terms = formulas.token_terms(student.logits(), teacher.logits(), token_T, "jsd")
    return (terms.divergence_T - terms.logp_T).mean()


def trl_loss(student: Projection, teacher: Projection, token_T: torch.Tensor) -> torch.Tensor:
    """Return the divergence alone, as TRL's GKD trainer computes it."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(student.logits()[None], teacher.logits()[None])


def liger_loss(student: Projection, teacher: Projection, token_T: torch.Tensor) -> torch.Tensor:
    """Return the mean of divergence and cross-entropy, chunk by chunk."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(compiled=torch.cuda.is_available())
    return loss(student.hidden_TH, student.weight_VH, teacher.hidden_TH, teacher.weight_VH, token_T)
