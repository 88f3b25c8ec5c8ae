"""`python -m benchmarks head`: log-probabilities and divergence of response tokens over a real vocabulary.

Baselines: whole logits (`losses.terms`); TRL's divergence function on whole logits; Liger's chunked loss. The last two
give one number for all tokens, from which no reward can be computed; they are timed for what they do give. T, V, H as
in `masters.models.losses.chunked_head`. All in float32, forward and backward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.measure import Row, compare, extra_mib, gpu_mib, seconds
from masters.models.losses import chunked_head, formulas
from masters.models.losses.chunked_head import Projection

REPEATS = 3


@dataclass(frozen=True)
class Sizes:
    """Response tokens, vocabulary, the models' widths; where and in what type the tensors are."""

    tokens: int = 1024
    vocabulary: int = 151_936
    student: int = 1024
    teacher: int = 2048
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


Way = Callable[[Projection, Projection, torch.Tensor], torch.Tensor]


def measured(sizes: Sizes = Sizes()) -> list[Row]:
    """Rows of time and memory against each baseline."""
    others = {"dense": dense, "TRL": trl, "Liger": liger}
    ours = seconds(prepared(chunked, sizes))
    rows = [compare(f"time, {n}", "s", ours, seconds(prepared(way, sizes)), REPEATS) for n, way in others.items()]
    return rows + [
        compare(f"memory, {n}", "MiB", peak(chunked, sizes), peak(way, sizes), 1) for n, way in others.items()
    ]


def peak(way: Way, sizes: Sizes) -> Callable[[], float]:
    """Measures MiB: in a fresh process above what was held before; of a GPU in all."""
    work = partial(prepared, way, sizes)
    return extra_mib(work) if sizes.device == "cpu" else gpu_mib(lambda: work()())


def prepared(way: Way, sizes: Sizes) -> Callable[[], None]:
    """One forward and backward pass on random states. The gradients are there before: their memory does not count."""
    torch.manual_seed(0)
    kind: Any = dict(device=sizes.device, dtype=sizes.dtype)
    student, teacher = (
        Projection(torch.randn(sizes.tokens, width, **kind), torch.randn(sizes.vocabulary, width, **kind) / width**0.5)
        for width in (sizes.student, sizes.teacher)
    )
    token_T = torch.randint(sizes.vocabulary, (sizes.tokens,), device=sizes.device)
    for part in (student.hidden_TH, student.weight_VH):
        part.requires_grad_()
        part.grad = torch.ones_like(part)

    def work() -> None:
        student.hidden_TH.grad = student.weight_VH.grad = None
        way(student, teacher, token_T).backward()

    return work


def chunked(student: Projection, teacher: Projection, token_T: torch.Tensor) -> torch.Tensor:
    terms = chunked_head.terms(student, teacher, token_T, "jsd")
    return (terms.divergence_T - terms.logp_T).mean()


def dense(student: Projection, teacher: Projection, token_T: torch.Tensor) -> torch.Tensor:
    terms = formulas.terms(student.logits(), teacher.logits(), token_T, "jsd")
    return (terms.divergence_T - terms.logp_T).mean()


def trl(student: Projection, teacher: Projection, token_T: torch.Tensor) -> torch.Tensor:
    """The divergence alone, as TRL's GKD trainer computes it."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(student.logits()[None], teacher.logits()[None])


def liger(student: Projection, teacher: Projection, token_T: torch.Tensor) -> torch.Tensor:
    """Divergence and cross-entropy, half and half, chunk by chunk."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(compiled=torch.cuda.is_available())
    return loss(student.hidden_TH, student.weight_VH, teacher.hidden_TH, teacher.weight_VH, token_T)
