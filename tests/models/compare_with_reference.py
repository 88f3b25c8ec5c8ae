"""The code under test against `reference`, as checks that tests of mutated code call too."""

from dataclasses import replace

import numpy as np
import torch

from masters.config import Rewards, Train
from masters.models.losses import formulas
from masters.models.packing.packed_batch import PackedBatch
from masters.models.training import objective
from tests.models import float64_reference
from tests.models.float64_reference import Batch
from tests.models.paper import paper_rewards, paper_train

VARIANTS = {
    "method": (paper_train(), paper_rewards()),
    "kl": (paper_train(divergence="kl", beta=0.5), paper_rewards()),
    "skew": (paper_train(divergence="skew"), paper_rewards()),
    "raw": (paper_train(), paper_rewards(distillation="raw")),
    "no distillation reward": (paper_train(beta=0.0), paper_rewards(distillation="off")),
    "no accuracy reward": (paper_train(beta=2.0), paper_rewards(accuracy="off")),
    "gated rewards": (paper_train(), paper_rewards(combine="gated")),
    "a noise floor in nats": (paper_train(), paper_rewards(distillation_floor=0.1)),
    "a relative noise floor": (paper_train(), paper_rewards(distillation_relative_floor=0.5)),
    "the usual estimator of the KL term": (paper_train(kl="k3", beta=1.0), paper_rewards()),
    "a squared KL term": (paper_train(kl="squared", beta=1.0), paper_rewards()),
    "a clipped KL term": (paper_train(kl="clipped", beta=1.0), paper_rewards()),
    "clipped negatives": (paper_train(negatives="clipped"), paper_rewards()),
    "negatives from the first difference": (paper_train(negatives="first_difference"), paper_rewards()),
    "clipped negatives without a KL term": (paper_train(negatives="clipped", beta=0.0), paper_rewards()),
    "no negatives": (paper_train(negatives="none", beta=0.0), paper_rewards(combine="gated")),
    "a shifted baseline and a weight": (paper_train(baseline_shift=-0.3, reward_weight=0.1), paper_rewards()),
    "balanced by the teacher's accuracy": (paper_train(balance="teacher_accuracy", reward_weight=0.5), paper_rewards()),
    "no reward": (paper_train(), paper_rewards(accuracy="off", distillation="off")),
}
Shape = list[list[tuple[int, float]]]  # per question, per response: its length and its verdict


def draw(shape: Shape, repeats: set[tuple[int, int]], seed: int, vocabulary: tuple[int, int] = (11, 11)) -> Batch:
    """Draw random logits and tokens. `repeats`: (question, j), j > 0, where response j repeats the one before it.

    `vocabulary`: the student's and the teacher's. A repeated response has other logits: sharing must show.
    """
    rng = np.random.default_rng(seed)
    questions = [[tuple(rng.integers(0, min(vocabulary), n).tolist()) for n, _ in one] for one in shape]
    for question, j in sorted(repeats):
        questions[question][j] = questions[question][j - 1]
    tokens = np.array([t for one in questions for response in one for t in response])
    student, teacher = (rng.normal(0, 2, (len(tokens), v)).astype(np.float32).astype(float) for v in vocabulary)
    pi_ref = (student + rng.normal(0, 0.8, student.shape)).astype(np.float32).astype(float)
    return Batch(questions, [[score for _, score in one] for one in shape], student, teacher, pi_ref)


def awkward(vocabulary: tuple[int, int] = (11, 11)) -> Batch:
    """Draw questions of different sizes, missing verdicts, repeated responses, and every kind of degenerate group."""
    nan = float("nan")
    shape: Shape = [
        [(3, 1.0), (1, 0.0), (5, 1.0), (2, 0.0)],
        [(2, 1.0), (2, 1.0), (4, 0.0)],
        [(1, 0.0), (4, nan), (2, 1.0), (2, 1.0), (3, nan), (2, 0.0)],
        [(3, 1.0)],
        [(2, 1.0), (2, 1.0)],
        [(2, nan), (3, nan)],
        [(1, 0.25), (2, nan)],
        [(2, 1.0), (3, 1.0), (1, 1.0)],
    ]
    return draw(shape, {(1, 1), (2, 3), (4, 1)}, seed=5, vocabulary=vocabulary)


def packed(batch: Batch) -> PackedBatch:
    """Return the batch's tokens as the packer describes them, without a model's inputs."""
    responses = [tokens for one in batch.questions for tokens in one]
    response_T = [r for r, tokens in enumerate(responses) for _ in tokens]
    question_R = [q for q, one in enumerate(batch.questions) for _ in one]
    return PackedBatch(
        inputs={},
        sampled_image_token_BL=None,
        predictor_U2=torch.empty(0),
        token_U=torch.tensor(batch.token_T.tolist()),
        distinct_T=torch.arange(len(batch.token_T)),
        response_T=torch.tensor(response_T),
        question_R=torch.tensor(question_R),
        responses_by_question=[
            [r for r, question in enumerate(question_R) if question == q] for q in range(len(batch.questions))
        ],
        sequence_id_R=[responses.index(tokens) for tokens in responses],
    )


def taught(pack: PackedBatch) -> torch.Tensor:
    """Return whether a response is a teacher's, as `float64_reference.objective` has it: every other one, [R]."""
    return torch.tensor([j % 2 == 0 for own in pack.responses_by_question for j in range(len(own))])


def dense_terms(
    student: torch.Tensor, teacher: torch.Tensor, pi_ref: torch.Tensor, pack: PackedBatch, train: Train
) -> formulas.Terms:
    """Return the trainer's terms from logits; log pi_ref as it would be stored where `train` stores it."""
    held = pi_ref if train.holds_reference else None
    made = formulas.token_terms(student, teacher, pack.token_T, train.divergence, held)
    if train.stores_reference:
        made = replace(made, reference_logp_T=formulas.chosen_log_probs(pi_ref.detach(), pack.token_T))
    return made


def tensors(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits of student, teacher and pi_ref, all with gradients, and verdicts."""
    student, teacher, pi_ref = (
        torch.tensor(x, dtype=torch.float32).requires_grad_()
        for x in (batch.student_TV, batch.teacher_TV, batch.reference_TV)
    )
    score_R = torch.tensor([score for one in batch.scores for score in one])
    return student, teacher, pi_ref, score_R


def close(found: object, expected: object, what: str, atol: float = 2e-5) -> None:
    found = found.detach().numpy() if isinstance(found, torch.Tensor) else found
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=atol, err_msg=what)


def check_objective(
    batch: Batch, train: Train, rewards: Rewards, is_trained_R: np.ndarray | None = None
) -> objective.Outcome:
    """Check `objective.masters_loss`: the loss, what it logs, and its gradient, which is the student's alone.

    `is_trained_R`: False for masked responses, whose weight in the loss is 0; None: none is masked.
    """
    expected = float64_reference.objective(batch, train, rewards, is_trained_R)
    student, teacher, pi_ref, score_R = tensors(batch)
    pack = packed(batch)
    terms = dense_terms(student, teacher, pi_ref, pack, train)
    is_trained = None if is_trained_R is None else torch.from_numpy(is_trained_R)
    outcome = objective.masters_loss(terms, score_R, pack, train, rewards, taught(pack), is_trained)
    outcome.loss.backward()
    assert teacher.grad is None, "a gradient reaches the teacher"
    assert pi_ref.grad is None, "a gradient reaches pi_ref"
    close(outcome.loss, expected.loss, "loss", atol=1e-4)
    close(student.grad, expected.gradient_TV, "gradient")
    logged = {
        "loss": expected.loss,
        "divergence": expected.question_sum(expected.divergence_R, batch),
        "reward_distillation": expected.question_sum(expected.distill_R, batch),
    }
    if train.holds_reference or (train.stores_reference and train.kl != "exact"):
        logged["kl_to_reference"] = expected.question_sum(expected.kl_R, batch)
    for name, value in logged.items():
        close(outcome.sums[name], value, name, atol=1e-4)
    return outcome


def check_responses(batch: Batch, train: Train, rewards: Rewards) -> None:
    """Check D, R_distill and A of every response, and the gradient of a sum that weights responses differently.

    Advantages of a group sum to zero, so in the objective, whose responses weigh alike, a gradient through the
    rewards would cancel out unseen.
    """
    count = sum(map(len, batch.questions))
    weight_R = np.random.default_rng(0).uniform(0.5, 2, count)
    expected = float64_reference.objective(batch, train, rewards, weight_R)
    pack, (student, teacher, pi_ref, score_R) = packed(batch), tensors(batch)
    terms = dense_terms(student, teacher, pi_ref, pack, train)
    divergence_R = objective.divergences(terms, pack)
    distill_R, advantage_R = objective.advantages(divergence_R, score_R, pack, rewards, train.baseline_shift)
    advantage_T = objective.bounded_advantages(terms, advantage_R, score_R, pack, train.negatives)
    kl_T = objective.kl_term(terms, train)
    kl_T = torch.zeros_like(terms.logp_T) if kl_T is None else kl_T
    grpo_R = formulas.grpo_loss(terms.logp_T, advantage_T, kl_T, pack.response_T, pack.responses, train.beta)
    reward_share_R, distill_share_R = objective.loss_weights(score_R, pack, train, taught(pack))
    loss_R = reward_share_R * train.reward_weight * grpo_R + distill_share_R * divergence_R
    weighed_R = loss_R * torch.tensor(weight_R)
    loss = objective.question_means(weighed_R, pack).sum()
    loss.backward()
    assert teacher.grad is None, "a gradient reaches the teacher"
    close(divergence_R, expected.divergence_R, "divergence")
    close(distill_R, expected.distill_R, "distillation reward")
    close(advantage_R, expected.advantage_R, "advantage", atol=2e-4)
    close(loss, expected.loss, "weighted loss", atol=1e-4)
    close(student.grad, expected.gradient_TV, "weighted gradient")


def check_fine_tuning(batch: Batch, is_trained_R: np.ndarray | None = None) -> None:
    """Check `objective.supervised` on the responses that are right and not masked: the loss and its gradient."""
    (student, _, _, score_R), pack = tensors(batch), packed(batch)
    is_trained = None if is_trained_R is None else torch.from_numpy(is_trained_R)
    logp_T = formulas.chosen_log_probs(student, pack.token_T)
    loss = objective.supervised(logp_T, pack, score_R, is_trained).loss
    loss.backward()
    expected, gradient_TV = float64_reference.fine_tuning(batch, is_trained_R)
    close(loss, expected, "fine-tuning loss")
    close(student.grad, gradient_TV, "fine-tuning gradient")


def check_all() -> None:
    """Check every variant on the awkward batch, with equal and unequal vocabularies."""
    for train, rewards in VARIANTS.values():
        for vocabulary in ((11, 11), (11, 13), (13, 11)):
            batch = awkward(vocabulary)
            check_objective(batch, train, rewards)
            check_responses(batch, train, rewards)
    check_fine_tuning(awkward())
    check_fine_tuning(draw([[(2, 0.5), (1, 0.49)]], set(), seed=8))
