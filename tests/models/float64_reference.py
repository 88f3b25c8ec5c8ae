"""The method's formulas in float64 NumPy, written from the paper's equations and not from the code under test.

Shapes: T response tokens of a batch, V vocabulary, R responses of a batch, G responses to one question. Questions and
responses are processed in plain loops. Gradients are central differences.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from masters.config import Rewards, Train
from tests.models.paper import paper_rewards, paper_train

Array = np.ndarray
METHOD, BOTH = paper_train(), paper_rewards()


def threshold(weight: Array, ratio: float) -> float:
    """Return lambda_r (Eq. 1-2), the magnitude at 0-based rank floor(r N), ascending; r = 0 gives 0, r = 1 infinity."""
    magnitude = np.append(np.sort(np.abs(np.asarray(weight, np.float64)).ravel()), math.inf)
    return 0.0 if ratio == 0 else magnitude[math.floor(Fraction(str(ratio)) * weight.size)]


def masked(weight: Array, limit: float) -> Array:
    """Return the weights with |w| >= lambda_r, the others as 0 (Eq. 1-2)."""
    return np.where(np.abs(weight) >= limit, weight, 0)


def mask_ratio(iteration: int, iterations: int, r_max: Fraction, step: Fraction) -> Fraction:
    """Return r[i] = r_max - s floor(i M / I), M = r_max / s + 1, clamped at 0 (Eq. 3)."""
    stages = r_max / step + 1
    return max(Fraction(0), r_max - step * math.floor(iteration * stages / iterations))


def stage(digest: str, stages: int) -> int:
    """Return a question's mask stage: floor(u M), u in [0, 1) from the digest read as a hexadecimal fraction."""
    return math.floor(Fraction(int(digest, 16), 16 ** len(digest)) * stages)


def softmax(logits: Array) -> Array:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_pi(logits_TV: Array, token_T: Array) -> Array:
    return np.log(softmax(logits_TV))[np.arange(len(token_T)), token_T]


def kl(p: Array, q: Array) -> Array:
    """Return KL(P || Q) = sum_v p log(p / q)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * np.log(p / q), 0.0).sum(-1)


def jsd(student_TV: Array, teacher_TV: Array) -> Array:
    """Return D = 1/2 KL(P || M) + 1/2 KL(Q || M), M = (P + Q) / 2 (Eq. 4-5); missing entries have probability 0."""
    width = max(student_TV.shape[1], teacher_TV.shape[1])
    q, p = (np.pad(softmax(x), ((0, 0), (0, width - x.shape[1]))) for x in (student_TV, teacher_TV))
    return 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2)


def kl_ablation(student_TV: Array, teacher_TV: Array) -> Array:
    """Return KL(P || Q) of teacher from student, over the entries that both have."""
    width = min(student_TV.shape[1], teacher_TV.shape[1])
    return kl(softmax(teacher_TV[:, :width]), softmax(student_TV[:, :width]))


def skewed(student_TV: Array, teacher_TV: Array) -> Array:
    """Return KL(P || P / 10 + 9 Q / 10), over the entries that both have."""
    width = min(student_TV.shape[1], teacher_TV.shape[1])
    q, p = softmax(student_TV[:, :width]), softmax(teacher_TV[:, :width])
    return kl(p, 0.1 * p + 0.9 * q)


def share_divergence(d_G: Array, responses: list[tuple[int, ...]], valid_G: Array) -> Array:
    """Replace D of valid responses by its mean over valid responses with identical tokens."""
    identical = [[k for k in np.flatnonzero(valid_G) if responses[k] == tokens] for tokens in responses]
    return np.array([d_G[k].mean() if valid_G[j] else d_G[j] for j, k in enumerate(identical)])


def distillation_reward(d_G: Array, valid_G: Array, floors: tuple[float, float] = (1e-5, 0.0)) -> Array:
    """Return R_distill = (D_max - D_j) / (D_max - D_min) over responses with a verdict (Eq. 6-7).

    All are 0 if D_max - D_min is noise: up to floors[0] nats, or floors[1] times the mean.
    """
    reward_G = np.zeros(len(d_G))
    if valid_G.any() and np.ptp(d_G[valid_G]) > max(floors[0], floors[1] * d_G[valid_G].mean()):
        reward_G[valid_G] = (d_G[valid_G].max() - d_G[valid_G]) / np.ptp(d_G[valid_G])
    return reward_G


def advantage(reward_G: Array, shift: float = 0.0) -> Array:
    """Return A = (R_j - mean R - shift) / std R, population std, over responses with a verdict (Eq. 8-11).

    All are 0 up to a std of 1e-4.
    """
    valid_G, advantage_G = ~np.isnan(reward_G), np.zeros(len(reward_G))
    if valid_G.any() and reward_G[valid_G].std() > 1e-4:
        advantage_G[valid_G] = (reward_G[valid_G] - reward_G[valid_G].mean() - shift) / reward_G[valid_G].std()
    return advantage_G


def kl_to_reference(logp: Array, reference: Array, estimator: str = "k3") -> Array:
    """Eq. 8-11, d = log pi_ref - log pi. k3: exp(d) - d - 1, clipped: its tangent beyond d = 1, squared: d^2 / 2."""
    d = reference - logp
    if estimator == "squared":
        return d**2 / 2
    value = np.exp(d) - d - 1
    return np.where(d > 1, math.e - 2 + (math.e - 1) * (d - 1), value) if estimator == "clipped" else value


def is_before_first_difference(batch: "Batch") -> Array:
    """Return whether a right response (R_acc >= 0.5) to the question begins with the response up to each token, [T]."""
    is_before = []
    for responses, scores in zip(batch.questions, batch.scores, strict=True):
        right = [other for other, score in zip(responses, scores, strict=True) if score >= 0.5]
        for tokens in responses:
            is_before += [any(other[:n] == tokens[:n] for other in right) for n in range(1, len(tokens) + 1)]
    return np.array(is_before)


def bounded_advantage(advantage: Array, logp_old: Array, batch: "Batch", negatives: str) -> Array:
    """Return tokens' advantages: A < 0 is kept, times min(1, pi_old / pi_ref), 0 before the first difference, or 0."""
    weight = {
        "full": 1.0,
        "clipped": np.minimum(1, np.exp(logp_old - batch.reference_T)),
        "first_difference": 1.0 - is_before_first_difference(batch),
        "none": 0.0,
    }[negatives]
    return np.where(advantage < 0, advantage * weight, advantage)


def kl_term(logits_TV: Array, batch: "Batch", estimator: str) -> Array:
    """Return D_KL(pi || pi_ref) of each token: exact, over the vocabulary, or estimated from the tokens."""
    if estimator == "exact":
        return kl(softmax(logits_TV), softmax(batch.reference_TV))
    return kl_to_reference(log_pi(logits_TV, batch.token_T), batch.reference_T, estimator)


def grpo(logp: Array, logp_old: Array, advantage: Array, kl_T: Array, beta: float) -> Array:
    """Return the term of each token: -[ pi / pi_old A - beta D_KL(pi || pi_ref) ], pi_old a constant (Eq. 8-11)."""
    return -(np.exp(logp - logp_old) * advantage - beta * kl_T)


def numerical_gradient(function: Callable[[Array], Array], logits_TV: Array, step: float = 1e-5) -> Array:
    """d function_t / d logits_tv by central differences; token t's value depends on token t's logits only."""
    columns = []
    for direction in step * np.eye(logits_TV.shape[1]):
        columns.append((function(logits_TV + direction) - function(logits_TV - direction)) / (2 * step))
    return np.stack(columns, 1)


@dataclass(frozen=True)
class Batch:
    """Questions with their responses' tokens and verdicts. Rows of the logits are response tokens in that order."""

    questions: list[list[tuple[int, ...]]]
    scores: list[list[float]]  # NaN without a verdict
    student_TV: Array
    teacher_TV: Array
    reference_TV: Array  # logits of pi_ref

    @property
    def token_T(self) -> Array:
        return np.array([token for responses in self.questions for tokens in responses for token in tokens])

    @property
    def reference_T(self) -> Array:
        """log pi_ref of the tokens."""
        return log_pi(self.reference_TV, self.token_T)


@dataclass(frozen=True)
class Result:
    loss: float  # summed over questions
    gradient_TV: Array  # of the loss with respect to the student's logits
    divergence_R: Array
    distill_R: Array
    reward_R: Array  # R_acc + R_distill, NaN without a verdict
    advantage_R: Array
    kl_R: Array

    def question_sum(self, value_R: Array, batch: Batch) -> float:
        """Return the sum over questions of the mean over a question's responses."""
        total, start = 0.0, 0
        for responses in batch.questions:
            total += value_R[start : start + len(responses)].mean()
            start += len(responses)
        return total


def token_spans(batch: Batch) -> list[list[slice]]:
    """Return the tokens of each response, by question."""
    start, by_question = 0, []
    for responses in batch.questions:
        by_question.append([])
        for tokens in responses:
            by_question[-1].append(slice(start, start + len(tokens)))
            start += len(tokens)
    return by_question


def fine_tuning(batch: Batch, is_trained_R: Array | None = None) -> tuple[float, Array]:
    """Return loss and gradient [T, V] of fine-tuning on right responses (R_acc >= 0.5) that are not masked.

    The loss is -log pi, mean over a right response's tokens and over a question's right responses, summed over
    questions. A question without a right response does not count.
    """
    share_T = np.zeros(len(batch.token_T))
    is_trained = iter([True] * len(share_T) if is_trained_R is None else is_trained_R)
    for tokens, scores in zip(token_spans(batch), batch.scores, strict=True):
        right = [t for t, score in zip(tokens, scores, strict=True) if next(is_trained) and score >= 0.5]
        for t in right:
            share_T[t] = 1 / (t.stop - t.start) / len(right)

    def terms(logits_TV: Array) -> Array:
        return -log_pi(logits_TV, batch.token_T)

    return (share_T * terms(batch.student_TV)).sum(), share_T[:, None] * numerical_gradient(terms, batch.student_TV)


def question_rewards(
    d_G: Array, responses: list[tuple[int, ...]], scores: list[float], rewards: Rewards
) -> tuple[Array, Array]:
    """Return R_distill and R of the responses to one question, [G] each (Eq. 6-7)."""
    score_G = np.zeros(len(responses)) if rewards.accuracy == "off" else np.array(scores)
    valid_G = ~np.isnan(score_G)
    same_G = share_divergence(d_G, responses, valid_G)
    floors = (rewards.distillation_floor, rewards.distillation_relative_floor)
    distill_G = {
        "minmax": distillation_reward(same_G, valid_G, floors),
        "raw": np.where(valid_G, -same_G, 0.0),
        "off": np.zeros(len(responses)),
    }[rewards.distillation]
    return distill_G, score_G * (1 + distill_G) if rewards.combine == "gated" else score_G + distill_G


def objective(
    batch: Batch,
    train: Train = METHOD,
    rewards: Rewards = BOTH,
    weight_R: Array | None = None,
    taught: Callable[[int, int], bool] = lambda question, j: j % 2 == 0,
) -> Result:
    """Eq. 4-11: w L_GRPO + D, mean over a response's tokens and a question's responses, summed over questions.

    Rewards and advantages are constants in the gradient. `weight_R`: weights of responses (default: all
    equal; 0 for a masked response). `taught`: whether response j to a question is a teacher's.
    """
    measure = {"jsd": jsd, "kl": kl_ablation, "skew": skewed}[train.divergence]
    logp_T, divergence_T = log_pi(batch.student_TV, batch.token_T), measure(batch.student_TV, batch.teacher_TV)
    d, distill, reward, adv, share_T, advantage_T = [], [], [], [], np.zeros(len(logp_T)), np.zeros(len(logp_T))
    trust_T = np.zeros(len(logp_T))
    for q, (responses, scores, tokens) in enumerate(
        zip(batch.questions, batch.scores, token_spans(batch), strict=True)
    ):
        verdicts = [x for j, x in enumerate(scores) if taught(q, j) and not math.isnan(x)]
        for t in tokens:
            trust_T[t] = np.mean([x >= 0.5 for x in verdicts]) if verdicts else 1.0
        d_G = np.array([divergence_T[t].mean() for t in tokens])
        distill_G, reward_G = question_rewards(d_G, responses, scores, rewards)
        advantage_G = advantage(reward_G, train.baseline_shift)
        for t, a in zip(tokens, advantage_G, strict=True):
            weight = 1.0 if weight_R is None else weight_R[len(adv)]
            share_T[t], advantage_T[t] = weight / (t.stop - t.start) / len(responses), a
            adv.append(a)
        d, distill, reward = [*d, *d_G], [*distill, *distill_G], [*reward, *reward_G]
    advantage_T = bounded_advantage(advantage_T, logp_T, batch, train.negatives)

    def terms(logits_TV: Array) -> Array:
        pi_T = log_pi(logits_TV, batch.token_T)
        rewarded_T = grpo(pi_T, logp_T, advantage_T, kl_term(logits_TV, batch, train.kl), train.beta)
        divergent_T = measure(logits_TV, batch.teacher_TV)
        if train.balance == "teacher_accuracy":
            return (1 - trust_T) * train.reward_weight * rewarded_T + trust_T * divergent_T
        return train.reward_weight * rewarded_T + divergent_T

    loss, gradient_TV = (
        (share_T * terms(batch.student_TV)).sum(),
        share_T[:, None] * numerical_gradient(terms, batch.student_TV),
    )
    k_T = kl_term(batch.student_TV, batch, train.kl)
    k = [k_T[t].mean() for tokens in token_spans(batch) for t in tokens]
    return Result(loss, gradient_TV, *(np.array(x) for x in (d, distill, reward, adv, k)))
