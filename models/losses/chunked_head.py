"""One pass over the vocabulary: what the losses need of every response token, without a full tensor of logits.

Shapes: T response tokens, C of them in a chunk, V vocabulary (the student's and the teacher's may differ), H a
model's width. Logits are made chunk by chunk in the forward pass and again in the backward pass, so that rewards,
which come between the two, need no second forward pass of a model. `losses.terms` says the same of whole logits.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from masters.models.losses.formulas import LN2, SKEW, Terms

CHUNK_BYTES = 64 << 20  # of a float32 buffer [C, V] on a CPU, whose caches are small; five or so are held at a time
GPU_CHUNK_BYTES = 1 << 30  # there, products of few rows leave most of it idle


@dataclass(frozen=True)
class Projection:
    """Hidden states [T, H] and the weight [V, H] of the head that makes logits of them, each of its own type."""

    hidden_TH: torch.Tensor
    weight_VH: torch.Tensor

    def chunks(self) -> Iterator[slice]:
        """Tokens whose log-probabilities take `chunk_bytes`."""
        size = max(1, chunk_bytes(self.hidden_TH.device.type) // (4 * len(self.weight_VH)))
        return (slice(at, at + size) for at in range(0, len(self.hidden_TH), size))

    def aligned(self) -> "Projection":
        """Both in the type of their products: where they differ, the states' on a GPU, float32 on a CPU, which has
        no faster one."""
        kinds = {self.hidden_TH.dtype, self.weight_VH.dtype}
        kind = self.hidden_TH.dtype if len(kinds) == 1 or self.hidden_TH.is_cuda else torch.float32
        return Projection(self.hidden_TH.to(kind), self.weight_VH.to(kind))

    def frozen(self) -> "Projection":
        """The same without a gradient to either tensor."""
        return Projection(self.hidden_TH.detach(), self.weight_VH.detach())

    def logits(self) -> torch.Tensor:
        """All of them, [T, V]."""
        both = self.aligned()
        return both.hidden_TH @ both.weight_VH.T

    def likeliest(self) -> torch.Tensor:
        """The token of the largest logit, [T], without a full tensor of them. No gradient."""
        with torch.no_grad():
            both = self.aligned()
            return torch.cat([_product(both.hidden_TH[of], both.weight_VH.T).argmax(-1) for of in both.chunks()])

    def log_softmax(self, of: slice) -> torch.Tensor:
        """Log-probabilities [C, V] in float32; the two are `aligned`."""
        logits_CV = _product(self.hidden_TH[of], self.weight_VH.T)
        return logits_CV.sub_(logits_CV.logsumexp(-1, keepdim=True))


def chunk_bytes(device: str) -> int:
    """Bytes of a float32 buffer [C, V] on a kind of device."""
    return GPU_CHUNK_BYTES if device.startswith("cuda") else CHUNK_BYTES


def terms(
    student: Projection,
    teacher: Projection,
    token_T: torch.Tensor,
    divergence: str,
    reference: Projection | None = None,
) -> Terms:
    """log pi of each token and D_t (Eq. 4-5), [T] each, differentiable in the student's two tensors alone.

    `divergence`: "jsd", "kl" or "skew", as `formulas.jensen_shannon`, `formulas.kl_divergence` and
    `formulas.skew_divergence` define them. With a `reference`, pi_ref, also `formulas.exact_kl` and log pi_ref.
    """
    others = teacher.frozen(), DIVERGENCES[divergence], reference and reference.frozen()
    return Terms(*_Terms.apply(student.hidden_TH, student.weight_VH, token_T, *others))


def chosen_log_probs(student: Projection, token_T: torch.Tensor) -> torch.Tensor:
    """log pi of each token, [T], differentiable in the student's two tensors, as `losses.chosen_log_probs`."""
    return _Terms.apply(student.hidden_TH, student.weight_VH, token_T, None, None, None)[0]


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
    """KL(P || Q) over the entries that both models have, normalized over these."""

    @staticmethod
    def value(q_CV: torch.Tensor, p_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, p = KullbackLeibler.shared(q_CV, p_CV)
        value_C = _dot(p.exp(), p - q)
        return value_C, value_C

    @staticmethod
    def slope(q_CV: torch.Tensor, p_CV: torch.Tensor, kept_C: torch.Tensor) -> torch.Tensor:
        """dD/dlogits = q - p, [C, V]."""
        q, p = KullbackLeibler.shared(q_CV, p_CV)
        return F.pad(q.exp_().sub_(p.exp_()), (0, q_CV.shape[1] - q.shape[1]))

    @staticmethod
    def shared(q_CV: torch.Tensor, p_CV: torch.Tensor) -> list[torch.Tensor]:
        n = min(q_CV.shape[1], p_CV.shape[1])
        return [x[:, :n] - x[:, :n].logsumexp(-1, keepdim=True) for x in (q_CV, p_CV)]


class Skewed:
    """KL(P || M), M = SKEW P + (1 - SKEW) Q, over the entries that both models have, normalized over these.

    With w = p / m, which is at most 1 / SKEW: D = sum_v p log w.
    """

    @staticmethod
    def value(q_CV: torch.Tensor, p_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """D_t, [C], and sum_v w q, which its slope needs."""
        q, p = KullbackLeibler.shared(q_CV, p_CV)
        log_w = p - _log_mixture(q, p)
        return _dot(p.exp(), log_w), _dot(q.exp(), log_w.exp())

    @staticmethod
    def slope(q_CV: torch.Tensor, p_CV: torch.Tensor, kept_C: torch.Tensor) -> torch.Tensor:
        """dD/dlogits = (1 - SKEW) q (sum_u w q - w), [C, V]."""
        q, p = KullbackLeibler.shared(q_CV, p_CV)
        w = (p - _log_mixture(q, p)).exp_()
        slope = (kept_C[:, None] - w).mul_(q.exp_()).mul_(1 - SKEW)
        return F.pad(slope, (0, q_CV.shape[1] - q.shape[1]))


def _log_mixture(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return torch.logaddexp(p + math.log(SKEW), q + math.log(1 - SKEW))


class ToReference:
    """KL(Q || R) of the student's Q from pi_ref's R, over the whole vocabulary: both are of one model."""

    @staticmethod
    def value(q_CV: torch.Tensor, r_CV: torch.Tensor) -> torch.Tensor:
        """[C]. Overwrites `r_CV`."""
        return _dot(q_CV.exp(), torch.sub(q_CV, r_CV, out=r_CV))

    @staticmethod
    def slope(q_CV: torch.Tensor, r_CV: torch.Tensor, value_C: torch.Tensor) -> torch.Tensor:
        """dKL/dlogits = q ((log q - log r) - KL), [C, V]. Overwrites `r_CV`."""
        return torch.sub(q_CV, r_CV, out=r_CV).sub_(value_C[:, None]).mul_(q_CV.exp())


DIVERGENCES = {"jsd": JensenShannon, "kl": KullbackLeibler, "skew": Skewed}


class _Terms(torch.autograd.Function):
    """Returns what `losses.Terms` holds, [T] each; without a teacher D_t is zero, without a reference the exact KL and
    log pi_ref are None. Slopes have the types of what they are of."""

    @staticmethod
    def forward(ctx: Any, hidden_TH, weight_VH, token_T, teacher, divergence, reference) -> tuple:
        student, teacher = Projection(hidden_TH, weight_VH).aligned(), teacher and teacher.aligned()
        reference = reference and reference.aligned()
        made_5T = [hidden_TH.new_zeros(len(token_T), dtype=torch.float32) for _ in range(5)]
        logp_T, value_T, kept_T, kl_T, reference_logp_T = made_5T
        looked_3T = hidden_TH.new_zeros(3, len(token_T), dtype=torch.float32)
        for of in student.chunks():
            q_CV = student.log_softmax(of)
            logp_T[of] = _chosen(q_CV, token_T[of])
            if reference is not None:
                r_CV = reference.log_softmax(of)
                reference_logp_T[of] = _chosen(r_CV, token_T[of])
                kl_T[of] = ToReference.value(q_CV, r_CV)
                del r_CV  # before the teacher's is made: no more buffers are held at a time than without a reference
            if teacher is not None:
                looked_3T[:, of] = _looked(q_CV, logp_T[of])
                value_T[of], kept_T[of] = divergence.value(q_CV, teacher.log_softmax(of))
        ctx.save_for_backward(hidden_TH, weight_VH, token_T, kept_T, kl_T)
        ctx.teacher, ctx.divergence, ctx.reference = teacher, divergence, reference
        looked = [looked_T.clone() for looked_T in looked_3T]  # outputs of their own, no views
        ctx.mark_non_differentiable(reference_logp_T, *looked)
        compared = (kl_T, reference_logp_T) if reference is not None else (None, None)
        return logp_T, value_T, *compared, *looked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logp_slope_T, value_slope_T, kl_slope_T, *_) -> tuple:
        hidden_TH, weight_VH, token_T, kept_T, kl_T = ctx.saved_tensors
        student, teacher, reference = Projection(hidden_TH, weight_VH).aligned(), ctx.teacher, ctx.reference
        kind = student.weight_VH.dtype
        hidden_slope_TH = torch.empty_like(hidden_TH)
        weight_slope_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        for of in student.chunks():
            q_CV, up_C1 = student.log_softmax(of), logp_slope_T[of, None]
            slope_CV = q_CV.exp().mul_(-up_C1).scatter_add_(1, token_T[of, None], up_C1)
            if teacher is not None:
                p_CV = teacher.log_softmax(of)
                slope_CV += ctx.divergence.slope(q_CV, p_CV, kept_T[of]).mul_(value_slope_T[of, None])
                del p_CV
            if reference is not None:
                r_CV = reference.log_softmax(of)
                slope_CV += ToReference.slope(q_CV, r_CV, kl_T[of]).mul_(kl_slope_T[of, None])
                del r_CV
            slope_CV = slope_CV.to(kind)
            hidden_slope_TH[of] = (slope_CV @ student.weight_VH).to(hidden_TH.dtype)
            _add_product(weight_slope_VH, slope_CV.T, student.hidden_TH[of])
        return hidden_slope_TH, weight_slope_VH.to(weight_VH.dtype), None, None, None, None


def _chosen(q_CV: torch.Tensor, token_C: torch.Tensor) -> torch.Tensor:
    return q_CV.gather(1, token_C[:, None])[:, 0]


def _looked(q_CV: torch.Tensor, logp_C: torch.Tensor) -> torch.Tensor:
    """Entropy, ||onehot - q||^2, and 1 where the token is the likeliest, [3, C], of a chunk's log-probabilities."""
    pi_CV = q_CV.exp()
    squared_C = 1 - 2 * logp_C.exp() + _dot(pi_CV, pi_CV)
    return torch.stack([-_dot(pi_CV, q_CV), squared_C.clamp_(min=0.0), (logp_C >= q_CV.amax(-1)).float()])


def _product(a_CH: torch.Tensor, b_HV: torch.Tensor) -> torch.Tensor:
    """a b in float32; of 16-bit factors a CPU rounds it to their type first, a GPU does not."""
    if a_CH.is_cuda and a_CH.dtype != torch.float32:
        return torch.mm(a_CH, b_HV, out_dtype=torch.float32)
    return (a_CH @ b_HV).float()


def _add_product(sum_VH: torch.Tensor, a_VC: torch.Tensor, b_CH: torch.Tensor) -> None:
    """sum += a b, the sum in float32; on a GPU without a further tensor [V, H]."""
    if a_VC.dtype == sum_VH.dtype:
        sum_VH.addmm_(a_VC, b_CH)
    elif a_VC.is_cuda:
        torch.addmm(sum_VH, a_VC, b_CH, out_dtype=torch.float32, out=sum_VH)
    else:
        sum_VH += a_VC @ b_CH


def _dot(a_CV: torch.Tensor, b_CV: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vecdot(a_CV, b_CV)
