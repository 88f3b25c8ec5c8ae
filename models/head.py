"""One pass over the vocabulary: what the losses need of every response token, without a full tensor of logits.

Shapes: T response tokens, C of them in a chunk, V vocabulary (the student's and the teacher's may differ), H a
model's width. Logits are made chunk by chunk in the forward pass and again in the backward pass, so that rewards,
which come between the two, need no second forward pass of a model. `losses.terms` says the same of whole logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from masters.models.losses import LN2, Terms

CHUNK_BYTES = 64 << 20  # of a float32 buffer [C, V]; five or so are held at a time


@dataclass(frozen=True)
class Projection:
    """Hidden states [T, H] and the weight [V, H] of the head that makes logits of them."""

    hidden_TH: torch.Tensor
    weight_VH: torch.Tensor

    def chunks(self) -> Iterator[slice]:
        """Tokens whose log-probabilities take `CHUNK_BYTES`."""
        size = max(1, CHUNK_BYTES // (4 * len(self.weight_VH)))
        return (slice(at, at + size) for at in range(0, len(self.hidden_TH), size))

    def logits(self) -> torch.Tensor:
        """All of them, [T, V]."""
        return self.hidden_TH @ self.weight_VH.T

    def log_softmax(self, of: slice) -> torch.Tensor:
        """Log-probabilities [C, V] in float32."""
        logits_CV = (self.hidden_TH[of] @ self.weight_VH.T).float()
        return logits_CV.sub_(logits_CV.logsumexp(-1, keepdim=True))


def terms(student: Projection, teacher: Projection, token_T: torch.Tensor, divergence: str) -> Terms:
    """log pi of each token and D_t (Eq. 4-5), [T] each, differentiable in the student's two tensors alone.

    `divergence`: "jsd" or "kl", as `losses.jensen_shannon` and `losses.kl_divergence` define them.
    """
    frozen = Projection(teacher.hidden_TH.detach(), teacher.weight_VH.detach())
    return Terms(*_Terms.apply(student.hidden_TH, student.weight_VH, token_T, frozen, DIVERGENCES[divergence]))


def chosen_log_probs(student: Projection, token_T: torch.Tensor) -> torch.Tensor:
    """log pi of each token, [T], differentiable in the student's two tensors, as `losses.chosen_log_probs`."""
    return _Terms.apply(student.hidden_TH, student.weight_VH, token_T, None, None)[0]


class JensenShannon:
    """With x = log p - log q: log(q / m) = ln 2 - softplus(x), and log(p / m) = ln 2 - softplus(-x).

    Where one model alone has an entry, softplus is 0. Each term is small where the models agree, so that float32 sums
    over a large vocabulary stay exact: ln 2 is never taken off a sum near it.
    """

    @staticmethod
    def value(q_CV: torch.Tensor, p_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """D_t, [C], and KL(Q || M), which its slope needs. Overwrites `p_CV`."""
        n, q, p = min(q_CV.shape[1], p_CV.shape[1]), q_CV.exp(), p_CV.exp()
        x = p_CV[:, :n].sub_(q_CV[:, :n])
        student_C = LN2 * q[:, n:].sum(-1) - _dot(q[:, :n], F.softplus(x).sub_(LN2))
        teacher_C = LN2 * p[:, n:].sum(-1) - _dot(p[:, :n], F.softplus(x.neg_()).sub_(LN2))
        return 0.5 * (student_C + teacher_C), student_C

    @staticmethod
    def slope(q_CV: torch.Tensor, p_CV: torch.Tensor, kept_C: torch.Tensor) -> torch.Tensor:
        """dD/dlogits = q (log(q / m) - KL(Q || M)) / 2, [C, V]. Overwrites `p_CV`."""
        n = min(q_CV.shape[1], p_CV.shape[1])
        gap = torch.full_like(q_CV, LN2)
        gap[:, :n] -= F.softplus(p_CV[:, :n].sub_(q_CV[:, :n]))
        return gap.sub_(kept_C[:, None]).mul_(q_CV.exp()).mul_(0.5)


class KullbackLeibler:
    """KL(P || Q) over the entries that both models have, normalised over these."""

    @staticmethod
    def value(q_CV: torch.Tensor, p_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, p = KullbackLeibler._shared(q_CV, p_CV)
        value_C = _dot(p.exp(), p - q)
        return value_C, value_C

    @staticmethod
    def slope(q_CV: torch.Tensor, p_CV: torch.Tensor, kept_C: torch.Tensor) -> torch.Tensor:
        """dD/dlogits = q - p, [C, V]."""
        q, p = KullbackLeibler._shared(q_CV, p_CV)
        return F.pad(q.exp_().sub_(p.exp_()), (0, q_CV.shape[1] - q.shape[1]))

    @staticmethod
    def _shared(q_CV: torch.Tensor, p_CV: torch.Tensor) -> list[torch.Tensor]:
        n = min(q_CV.shape[1], p_CV.shape[1])
        return [x[:, :n] - x[:, :n].logsumexp(-1, keepdim=True) for x in (q_CV, p_CV)]


DIVERGENCES = {"jsd": JensenShannon, "kl": KullbackLeibler}


class _Terms(torch.autograd.Function):
    """Returns log pi and D_t, [T] each; without a teacher D_t is zero."""

    @staticmethod
    def forward(ctx: Any, hidden_TH, weight_VH, token_T, teacher, divergence) -> tuple[torch.Tensor, torch.Tensor]:
        student = Projection(hidden_TH, weight_VH)
        logp_T = hidden_TH.new_zeros(len(token_T), dtype=torch.float32)
        value_T, kept_T = torch.zeros_like(logp_T), torch.zeros_like(logp_T)
        for of in student.chunks():
            q_CV = student.log_softmax(of)
            logp_T[of] = q_CV.gather(1, token_T[of, None])[:, 0]
            if teacher is not None:
                value_T[of], kept_T[of] = divergence.value(q_CV, teacher.log_softmax(of))
        ctx.save_for_backward(hidden_TH, weight_VH, token_T, kept_T)
        ctx.teacher, ctx.divergence = teacher, divergence
        return logp_T, value_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logp_slope_T, value_slope_T) -> tuple:
        hidden_TH, weight_VH, token_T, kept_T = ctx.saved_tensors
        student = Projection(hidden_TH, weight_VH)
        hidden_slope_TH = torch.empty_like(hidden_TH)
        weight_slope_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        for of in student.chunks():
            q_CV, up_C1 = student.log_softmax(of), logp_slope_T[of, None]
            slope_CV = q_CV.exp().mul_(-up_C1).scatter_add_(1, token_T[of, None], up_C1)
            if ctx.teacher is not None:
                p_CV = ctx.teacher.log_softmax(of)
                slope_CV += ctx.divergence.slope(q_CV, p_CV, kept_T[of]).mul_(value_slope_T[of, None])
            slope_CV = slope_CV.to(weight_VH.dtype)
            hidden_slope_TH[of] = slope_CV @ weight_VH
            _add_product(weight_slope_VH, slope_CV.T, hidden_TH[of])
        return hidden_slope_TH, weight_slope_VH.to(weight_VH.dtype), None, None, None


def _add_product(sum_VH: torch.Tensor, a_VC: torch.Tensor, b_CH: torch.Tensor) -> None:
    """sum += a b, the sum in float32."""
    if a_VC.dtype == sum_VH.dtype:
        sum_VH.addmm_(a_VC, b_CH)
    else:
        sum_VH += a_VC @ b_CH


def _dot(a_CV: torch.Tensor, b_CV: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vecdot(a_CV, b_CV)
