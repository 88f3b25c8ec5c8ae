"""Parts of the losses as pure functions of logits and log-probabilities (Eq. 4-5, 8-11).

Shapes: T response tokens, N of them selected, V vocabulary, R responses. Logits may be of any float type; all sums are
float32.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

LN2 = math.log(2)
SKEW = 0.1  # lambda of the skewed divergence


@dataclass(frozen=True)
class Terms:
    """Per-token terms of the objective, [T] each.

    logp_T: log pi of the token.
    divergence_T: D_t (Eq. 4-5).
    kl_T: the exact D_KL(pi || pi_ref); None without a forward pass of pi_ref.
    reference_logp_T: log pi_ref of the token, a constant; None where the objective does not use it.

    Without a gradient, for diagnostics:
    entropy_T: entropy of pi, in nats.
    squared_grad_T: ||onehot - pi||^2, the squared gradient of log pi with respect to the logits.
    greedy_T: whether the token is pi's likeliest.
    """

    logp_T: torch.Tensor
    divergence_T: torch.Tensor
    kl_T: torch.Tensor | None = None
    reference_logp_T: torch.Tensor | None = None
    entropy_T: torch.Tensor | None = None
    squared_grad_T: torch.Tensor | None = None
    greedy_T: torch.Tensor | None = None

    def select(self, index_N: torch.Tensor) -> "Terms":
        """Return the terms of the tokens at these indices, [N] each."""
        selected: list[Any] = [None if value_T is None else value_T[index_N] for value_T in vars(self).values()]
        return Terms(*selected)


def token_terms(
    student_logits_TV: torch.Tensor,
    teacher_logits_TV: torch.Tensor,
    token_T: torch.Tensor,
    divergence: str,
    reference_logits_TV: torch.Tensor | None = None,
) -> Terms:
    """Return the loss terms; the dense reference of `chunked_head.token_terms`. `divergence`: "jsd", "kl" or "skew"."""
    compute = {"jsd": jensen_shannon, "kl": kl_divergence, "skew": skew_divergence}[divergence]
    pi_TV = student_logits_TV.detach().float().softmax(-1)
    terms = Terms(
        chosen_log_probs(student_logits_TV, token_T),
        compute(student_logits_TV, teacher_logits_TV),
        entropy_T=-torch.xlogy(pi_TV, pi_TV).sum(-1),
        squared_grad_T=(F.one_hot(token_T, pi_TV.shape[1]) - pi_TV).square().sum(-1),
        greedy_T=pi_TV.argmax(-1) == token_T,
    )
    if reference_logits_TV is None:
        return terms
    return replace(
        terms,
        kl_T=exact_kl(student_logits_TV, reference_logits_TV),
        reference_logp_T=chosen_log_probs(reference_logits_TV.detach(), token_T),
    )


def jensen_shannon(student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor) -> torch.Tensor:
    """Return D = 1/2 KL(P || M) + 1/2 KL(Q || M), M = (P + Q) / 2, in nats per token, [T] (Eq. 4-5).

    P is the teacher's, Q the student's next-token distribution; the mean is of probabilities, not logits. No
    gradient reaches the teacher. Ours: where only one model has an entry (padded vocabularies), the other's
    probability is zero. Dense reference: holds several [T, V] tensors.
    """
    q, p = _log_probs(student_logits_TV, teacher_logits_TV)
    absent = (p == -math.inf) & (q == -math.inf)  # logaddexp has no gradient there
    m = torch.logaddexp(p.masked_fill(absent, 0.0), q.masked_fill(absent, 0.0)) - LN2
    return 0.5 * (_expected_log_ratio(p, m) + _expected_log_ratio(q, m))


def kl_divergence(student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor) -> torch.Tensor:
    """Return KL(P || Q) = sum_v p (log p - log q) of the teacher's P from the student's Q, in nats per token, [T].

    The `kl` ablation replaces D in Eq. 4-5 by it. Ours: both distributions are taken over the entries that both models
    have. With one that only the teacher has (padding of its embedding matrix, never a token) the divergence would be
    infinite whatever the student does.
    """
    shared = min(student_logits_TV.shape[-1], teacher_logits_TV.shape[-1])
    q, p = _log_probs(student_logits_TV[:, :shared], teacher_logits_TV[:, :shared])
    return _expected_log_ratio(p, q)


def skew_divergence(student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor) -> torch.Tensor:
    """Return KL(P || M), M = lambda P + (1 - lambda) Q, lambda = 0.1, in nats per token, [T]; at most ln 10.

    Ours, in place of D in Eq. 4-5: skewed KL (DistiLLM, arXiv 2402.03898). Where the student is confidently wrong its
    gradient does not vanish, unlike that of the Jensen-Shannon divergence. As in `kl_divergence`, over the entries that
    both models have.
    """
    shared = min(student_logits_TV.shape[-1], teacher_logits_TV.shape[-1])
    q, p = _log_probs(student_logits_TV[:, :shared], teacher_logits_TV[:, :shared])
    absent = (p == -math.inf) & (q == -math.inf)  # logaddexp has no gradient there
    finite_p, finite_q = p.masked_fill(absent, 0.0), q.masked_fill(absent, 0.0)
    return _expected_log_ratio(p, torch.logaddexp(finite_p + math.log(SKEW), finite_q + math.log(1 - SKEW)))


def chosen_log_probs(logits_TV: torch.Tensor, token_T: torch.Tensor) -> torch.Tensor:
    """Return log pi(token) = log softmax(logits)[token], [T]: the policy of Eq. 8-11 at the response tokens."""
    return logits_TV.float().log_softmax(-1).gather(1, token_T[:, None])[:, 0]


def exact_kl(student_logits_TV: torch.Tensor, reference_logits_TV: torch.Tensor) -> torch.Tensor:
    """Return D_KL(pi || pi_ref) = sum_v pi (log pi - log pi_ref) over the whole vocabulary, in nats per token, [T].

    Eq. 8-11. Ours, as the paper leaves the estimator open. Its gradient with respect to the logits,
    pi ((log pi - log pi_ref) - KL), has a 1-norm of at most 2 (1 + KL), and KL is at most -log pi_ref of the rarest
    token, a constant of the round. Unlike the gradient of "k3" it does not grow as the student's probability of a token
    falls. No gradient reaches pi_ref.
    """
    q, r = _log_probs(student_logits_TV, reference_logits_TV)
    return _expected_log_ratio(q, r)


def kl_to_reference(logp_T: torch.Tensor, reference_logp_T: torch.Tensor, estimator: str) -> torch.Tensor:
    """Estimate D_KL(pi || pi_ref) from the chosen tokens, [T], with d = log pi_ref - log pi (Eq. 8-11).

    log pi_ref is a constant. Ours, as the paper leaves the estimator open. "k3": exp(d) - d - 1, GRPO's usual one. It
    is meant for tokens that pi samples; on stored tokens its derivative, 1 - exp(d), grows without bound where pi falls
    below pi_ref. "clipped": the same with the derivative clipped at its value at d = 1, 1 - e. "squared": d^2 / 2, with
    derivative -d.
    """
    d = reference_logp_T - logp_T
    if estimator == "squared":
        return 0.5 * d.square()
    near = d.clamp(max=1.0) if estimator == "clipped" else d
    return torch.expm1(near) - near + math.expm1(1) * (d - near)


def response_means(value_T: torch.Tensor, response_T: torch.Tensor, responses: int) -> torch.Tensor:
    """Return the mean over each response's tokens, [R]. `response_T`: the response (0..R-1) that a token belongs to.

    Ours, as the paper leaves averaging open: D_j = mean_t D_t (Eq. 4-5), and mean_t in Eq. 8-11.
    """
    sums = value_T.new_zeros(responses).index_add(0, response_T, value_T)
    return sums / torch.bincount(response_T, minlength=responses).to(value_T.dtype)


def grpo_loss(
    logp_T: torch.Tensor,
    advantage_T: torch.Tensor,
    kl_T: torch.Tensor,
    response_T: torch.Tensor,
    responses: int,
    beta: float,
) -> torch.Tensor:
    """Return - mean_t [ratio_t A_t - beta D_KL(pi || pi_ref)] per response, [R] (Eq. 8-11).

    ratio = pi / stop_gradient(pi) is 1 in value, since a batch is used for one update; its gradient is that of
    log pi. A_t: `token_advantages`, without a gradient; D_KL, `kl_T`: `exact_kl` or `kl_to_reference`. The caller
    averages responses over a question and questions over the batch.
    """
    ratio_T = torch.exp(logp_T - logp_T.detach())
    gain_T = ratio_T * advantage_T.detach() - beta * kl_T
    return -response_means(gain_T, response_T, responses)


def token_advantages(
    terms: Terms, advantage_T: torch.Tensor, negatives: str, spared_T: torch.Tensor | None = None
) -> torch.Tensor:
    """Return each token's advantage, [T], from that of its response; no gradient. `negatives`: the rule for A < 0.

    Ours, as the paper bounds nothing: on stored responses -A log pi lowers a wrong token's probability without bound.
    "full": A; "clipped": A min(1, pi / pi_ref) (truncated importance sampling, TOPR, arXiv 2503.14286);
    "first_difference": A, but 0 for `spared_T`, as `first_difference.spared_tokens` finds them; "none": 0.
    """
    if negatives == "none":
        return advantage_T.clamp(min=0.0)
    if negatives == "first_difference":
        assert spared_T is not None, "first_difference needs the tokens that are spared"
        return torch.where(spared_T, advantage_T.clamp(min=0.0), advantage_T)
    if negatives == "clipped":
        assert terms.reference_logp_T is not None, "clipped negatives need log pi_ref"
        weight_T = torch.exp(terms.logp_T.detach() - terms.reference_logp_T).clamp(max=1.0)
        return torch.where(advantage_T < 0, advantage_T * weight_T, advantage_T)
    return advantage_T


def _log_probs(student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-softmax of both in float32; the narrower one is padded with probability zero."""
    q, p = (x.float().log_softmax(-1) for x in (student_logits_TV, teacher_logits_TV.detach()))
    width = max(q.shape[1], p.shape[1])
    q, p = (F.pad(x, (0, width - x.shape[1]), value=-math.inf) for x in (q, p))
    return q, p


def _expected_log_ratio(p_TV: torch.Tensor, other_TV: torch.Tensor) -> torch.Tensor:
    """Return sum_v p (log p - log other), [T]; a term of probability zero is zero, and so is its gradient."""
    present = p_TV > -math.inf
    p = p_TV.masked_fill(~present, 0.0)
    other = other_TV.masked_fill(~present, 0.0)
    return (torch.where(present, p.exp(), 0.0) * (p - other)).sum(-1)
