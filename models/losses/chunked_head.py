"""Per-token terms of the losses from hidden states, without a full tensor of logits.

Shapes: T response tokens, C of them in a chunk, V vocabulary (the student's and the teacher's may differ), H hidden
size of a model. q, p and r are log-probabilities of student, teacher and pi_ref. Logits are made chunk by chunk in the
forward pass and again in the backward pass, so that rewards, which come between the two, need no second forward pass
of a model. `formulas.token_terms` computes the same from full logits.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from masters.models.losses.formulas import LN2, SKEW, Terms

CHUNK_BYTES = 64 << 20  # of a float32 buffer [C, V] on a CPU, whose caches are small; about five are held at a time
GPU_CHUNK_BYTES = 1 << 30  # on a GPU, matrix products of few rows leave most of it idle


@dataclass(frozen=True)
class Projection:
    """Hidden states [T, H] and the weight [V, H] of the head that makes logits of them, each of its own type.

    vocabulary: number of token ids, where the head has more rows: they pad it, stand for no token and make no logit.
    """

    hidden_TH: torch.Tensor
    weight_VH: torch.Tensor
    vocabulary: int | None = None

    def chunks(self) -> Iterator[slice]:
        """Return slices of tokens whose log-probabilities take `chunk_bytes`."""
        size = max(1, chunk_bytes(self.hidden_TH.device.type) // (4 * len(self.weight_VH)))
        return (slice(start, start + size) for start in range(0, len(self.hidden_TH), size))

    def match_dtypes(self) -> "Projection":
        """Return the projection without rows beyond the vocabulary, with both tensors in the type of their product.

        If the types differ, the product has the type of the hidden states on a GPU. On a CPU it has float32, as no
        other type is faster there.
        """
        dtypes = {self.hidden_TH.dtype, self.weight_VH.dtype}
        dtype = self.hidden_TH.dtype if len(dtypes) == 1 or self.hidden_TH.is_cuda else torch.float32
        return Projection(self.hidden_TH.to(dtype), self.weight_VH[: self.vocabulary].to(dtype))

    def detach(self) -> "Projection":
        """Return the same without a gradient to either tensor."""
        return Projection(self.hidden_TH.detach(), self.weight_VH.detach(), self.vocabulary)

    def logits(self) -> torch.Tensor:
        """Return the logits of all tokens, [T, V]."""
        matched = self.match_dtypes()
        return matched.hidden_TH @ matched.weight_VH.T

    @torch.no_grad()
    def argmax(self) -> torch.Tensor:
        """Return the token with the largest logit, [T], without a full tensor of logits. No gradient."""
        matched = self.match_dtypes()
        weight_HV = matched.weight_VH.T
        return torch.cat([_matmul(matched.hidden_TH[chunk], weight_HV).argmax(-1) for chunk in matched.chunks()])

    def log_softmax(self, chunk: slice) -> torch.Tensor:
        """Return log-probabilities [C, V] in float32. Call it on a projection that `match_dtypes` returned."""
        logits_CV = _matmul(self.hidden_TH[chunk], self.weight_VH.T)
        return logits_CV.sub_(logits_CV.logsumexp(-1, keepdim=True))


def chunk_bytes(device: str) -> int:
    """Return the bytes of a float32 buffer [C, V] on a kind of device."""
    return GPU_CHUNK_BYTES if device.startswith("cuda") else CHUNK_BYTES


def token_terms(
    student: Projection,
    teacher: Projection,
    token_T: torch.Tensor,
    divergence: str,
    reference: Projection | None = None,
) -> Terms:
    """Return log pi and D_t of each token (Eq. 4-5), [T] each, differentiable in the student's two tensors only.

    `divergence`: "jsd", "kl" or "skew", as `formulas.jensen_shannon`, `formulas.kl_divergence` and
    `formulas.skew_divergence` define them. With a `reference`, pi_ref, also `formulas.exact_kl` and log pi_ref.
    """
    frozen = teacher.detach(), DIVERGENCES[divergence], reference and reference.detach()
    return Terms(*_TokenTerms.apply(student.hidden_TH, student.weight_VH, student.vocabulary, token_T, *frozen))


def chosen_log_probs(student: Projection, token_T: torch.Tensor) -> torch.Tensor:
    """Return log pi of each token, [T], as `formulas.chosen_log_probs`, differentiable in the student's two tensors."""
    return _TokenTerms.apply(student.hidden_TH, student.weight_VH, student.vocabulary, token_T, None, None, None)[0]


class Divergence(Protocol):
    """A divergence of the student's q_CV from the teacher's p_CV. Both methods may overwrite `p_CV`."""

    @staticmethod
    def value(q_CV: torch.Tensor, p_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return D_t, [C], and the values that its gradient needs again, [C]."""
        ...

    @staticmethod
    def gradient(q_CV: torch.Tensor, p_CV: torch.Tensor, saved_C: torch.Tensor) -> torch.Tensor:
        """Return dD/dlogits of the student, [C, V]. `saved_C`: the second result of `value`."""
        ...


class JensenShannon:
    """Jensen-Shannon divergence.

    With x = log p - log q: log(q / m) = ln 2 - softplus(x), and log(p / m) = ln 2 - softplus(-x).

    Where only one model has an entry, softplus is 0. Each term is small where the models agree, so that float32 sums
    over a large vocabulary stay exact: ln 2 is never subtracted from a sum near it.
    """

    @staticmethod
    def value(q_CV: torch.Tensor, p_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return D_t and KL(Q || M)."""
        n, q, p = min(q_CV.shape[1], p_CV.shape[1]), q_CV.exp(), p_CV.exp()
        x = p_CV[:, :n].sub_(q_CV[:, :n])
        student_C = LN2 * q[:, n:].sum(-1) - _dot(q[:, :n], F.softplus(x).sub_(LN2))
        teacher_C = LN2 * p[:, n:].sum(-1) - _dot(p[:, :n], F.softplus(x.neg_()).sub_(LN2))
        return 0.5 * (student_C + teacher_C), student_C

    @staticmethod
    def gradient(q_CV: torch.Tensor, p_CV: torch.Tensor, saved_C: torch.Tensor) -> torch.Tensor:
        """Return dD/dlogits = q (log(q / m) - KL(Q || M)) / 2."""
        n = min(q_CV.shape[1], p_CV.shape[1])
        log_ratio_CV = torch.full_like(q_CV, LN2)  # log(q / m)
        log_ratio_CV[:, :n] -= F.softplus(p_CV[:, :n].sub_(q_CV[:, :n]))
        return log_ratio_CV.sub_(saved_C[:, None]).mul_(q_CV.exp()).mul_(0.5)


class KullbackLeibler:
    """KL(P || Q) over the entries that both models have, normalized over these."""

    @staticmethod
    def value(q_CV: torch.Tensor, p_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, p = KullbackLeibler.shared(q_CV, p_CV)
        value_C = _dot(p.exp(), p - q)
        return value_C, value_C

    @staticmethod
    def gradient(q_CV: torch.Tensor, p_CV: torch.Tensor, saved_C: torch.Tensor) -> torch.Tensor:
        """Return dD/dlogits = q - p."""
        q, p = KullbackLeibler.shared(q_CV, p_CV)
        return F.pad(q.exp_().sub_(p.exp_()), (0, q_CV.shape[1] - q.shape[1]))

    @staticmethod
    def shared(q_CV: torch.Tensor, p_CV: torch.Tensor) -> list[torch.Tensor]:
        """Return the log-probabilities of both over the shared entries, normalized again."""
        n = min(q_CV.shape[1], p_CV.shape[1])
        return [x[:, :n] - x[:, :n].logsumexp(-1, keepdim=True) for x in (q_CV, p_CV)]


class Skewed:
    """KL(P || M), M = SKEW P + (1 - SKEW) Q, over the entries that both models have, normalized over these.

    With w = p / m, which is at most 1 / SKEW: D = sum_v p log w.
    """

    @staticmethod
    def value(q_CV: torch.Tensor, p_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return D_t and sum_v w q."""
        q, p = KullbackLeibler.shared(q_CV, p_CV)
        log_w = p - _log_mixture(q, p)
        return _dot(p.exp(), log_w), _dot(q.exp(), log_w.exp())

    @staticmethod
    def gradient(q_CV: torch.Tensor, p_CV: torch.Tensor, saved_C: torch.Tensor) -> torch.Tensor:
        """Return dD/dlogits = (1 - SKEW) q (sum_u w q - w)."""
        q, p = KullbackLeibler.shared(q_CV, p_CV)
        w = (p - _log_mixture(q, p)).exp_()
        gradient = (saved_C[:, None] - w).mul_(q.exp_()).mul_(1 - SKEW)
        return F.pad(gradient, (0, q_CV.shape[1] - q.shape[1]))


def _log_mixture(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return torch.logaddexp(p + math.log(SKEW), q + math.log(1 - SKEW))


class KLToReference:
    """KL(Q || R) of the student's Q from pi_ref's R, over the whole vocabulary: both come from one model."""

    @staticmethod
    def value(q_CV: torch.Tensor, r_CV: torch.Tensor) -> torch.Tensor:
        """Return the divergence, [C]. Overwrites `r_CV`."""
        return _dot(q_CV.exp(), torch.sub(q_CV, r_CV, out=r_CV))

    @staticmethod
    def gradient(q_CV: torch.Tensor, r_CV: torch.Tensor, value_C: torch.Tensor) -> torch.Tensor:
        """Return dKL/dlogits = q ((log q - log r) - KL), [C, V]. Overwrites `r_CV`."""
        return torch.sub(q_CV, r_CV, out=r_CV).sub_(value_C[:, None]).mul_(q_CV.exp())


DIVERGENCES: dict[str, type[Divergence]] = {"jsd": JensenShannon, "kl": KullbackLeibler, "skew": Skewed}


class _TokenTerms(torch.autograd.Function):
    """Computes the fields of `formulas.Terms`, [T] each.

    Without a teacher D_t is zero; without a reference the exact KL and log pi_ref are None. Gradients have the types
    of the tensors that they belong to.
    """

    @staticmethod
    def forward(ctx: Any, hidden_TH, weight_VH, vocabulary, token_T, teacher, divergence, reference) -> tuple:
        student = Projection(hidden_TH, weight_VH, vocabulary).match_dtypes()
        teacher, reference = teacher and teacher.match_dtypes(), reference and reference.match_dtypes()
        zeros_5T = [hidden_TH.new_zeros(len(token_T), dtype=torch.float32) for _ in range(5)]
        logp_T, divergence_T, saved_T, kl_T, reference_logp_T = zeros_5T
        diagnostics_3T = hidden_TH.new_zeros(3, len(token_T), dtype=torch.float32)
        for chunk in student.chunks():
            q_CV = student.log_softmax(chunk)
            logp_T[chunk] = _gather_tokens(q_CV, token_T[chunk])
            if reference is not None:
                r_CV = reference.log_softmax(chunk)
                reference_logp_T[chunk] = _gather_tokens(r_CV, token_T[chunk])
                kl_T[chunk] = KLToReference.value(q_CV, r_CV)
                del r_CV  # before the teacher's is made: no more buffers are held at a time than without a reference
            if teacher is not None:
                diagnostics_3T[:, chunk] = _diagnostics(q_CV, logp_T[chunk])
                divergence_T[chunk], saved_T[chunk] = divergence.value(q_CV, teacher.log_softmax(chunk))
        ctx.save_for_backward(hidden_TH, weight_VH, token_T, saved_T, kl_T)
        ctx.vocabulary, ctx.teacher, ctx.divergence, ctx.reference = vocabulary, teacher, divergence, reference
        diagnostics = [value_T.clone() for value_T in diagnostics_3T]  # autograd takes no views as outputs
        ctx.mark_non_differentiable(reference_logp_T, *diagnostics)
        to_reference = (kl_T, reference_logp_T) if reference is not None else (None, None)
        return logp_T, divergence_T, *to_reference, *diagnostics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp_T, grad_divergence_T, grad_kl_T, *_) -> tuple:
        hidden_TH, weight_VH, token_T, saved_T, kl_T = ctx.saved_tensors
        student = Projection(hidden_TH, weight_VH, ctx.vocabulary).match_dtypes()
        teacher, reference = ctx.teacher, ctx.reference
        grad_hidden_TH = torch.empty_like(hidden_TH)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)  # stays 0 beyond the vocabulary
        for chunk in student.chunks():
            q_CV, grad_logp_C1 = student.log_softmax(chunk), grad_logp_T[chunk, None]
            grad_logits_CV = q_CV.exp().mul_(-grad_logp_C1).scatter_add_(1, token_T[chunk, None], grad_logp_C1)
            if teacher is not None:
                p_CV = teacher.log_softmax(chunk)
                gradient_CV = ctx.divergence.gradient(q_CV, p_CV, saved_T[chunk])
                grad_logits_CV += gradient_CV.mul_(grad_divergence_T[chunk, None])
                del p_CV, gradient_CV
            if reference is not None:
                r_CV = reference.log_softmax(chunk)
                gradient_CV = KLToReference.gradient(q_CV, r_CV, kl_T[chunk])
                grad_logits_CV += gradient_CV.mul_(grad_kl_T[chunk, None])
                del r_CV, gradient_CV
            grad_logits_CV = grad_logits_CV.to(student.weight_VH.dtype)
            grad_hidden_TH[chunk] = (grad_logits_CV @ student.weight_VH).to(hidden_TH.dtype)
            _add_matmul(grad_weight_VH[: ctx.vocabulary], grad_logits_CV.T, student.hidden_TH[chunk])
        return grad_hidden_TH, grad_weight_VH.to(weight_VH.dtype), None, None, None, None, None


def _gather_tokens(q_CV: torch.Tensor, token_C: torch.Tensor) -> torch.Tensor:
    return q_CV.gather(1, token_C[:, None])[:, 0]


def _diagnostics(q_CV: torch.Tensor, logp_C: torch.Tensor) -> torch.Tensor:
    """Return the entropy, ||onehot - pi||^2, and 1 where the token is the likeliest, [3, C]."""
    pi_CV = q_CV.exp()
    squared_C = 1 - 2 * logp_C.exp() + _dot(pi_CV, pi_CV)
    return torch.stack([-_dot(pi_CV, q_CV), squared_C.clamp_(min=0.0), (logp_C >= q_CV.amax(-1)).float()])


def _matmul(a_CH: torch.Tensor, b_HV: torch.Tensor) -> torch.Tensor:
    """Return a b in float32. With 16-bit factors a CPU first rounds the product to their type; a GPU does not."""
    if a_CH.is_cuda and a_CH.dtype != torch.float32:
        return torch.mm(a_CH, b_HV, out_dtype=torch.float32)
    return (a_CH @ b_HV).float()


def _add_matmul(sum_VH: torch.Tensor, a_VC: torch.Tensor, b_CH: torch.Tensor) -> None:
    """Add a b to the float32 `sum_VH` in place; on a GPU without another tensor [V, H]."""
    if a_VC.dtype == sum_VH.dtype:
        sum_VH.addmm_(a_VC, b_CH)
    elif a_VC.is_cuda:
        torch.addmm(sum_VH, a_VC, b_CH, out_dtype=torch.float32, out=sum_VH)
    else:
        sum_VH += a_VC @ b_CH


def _dot(a_CV: torch.Tensor, b_CV: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vecdot(a_CV, b_CV)
