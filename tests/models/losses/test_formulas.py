"""The losses against float64 NumPy. Shapes: T tokens, V vocabulary, R responses."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from masters.models.losses.formulas import (
    Terms,
    chosen_log_probs,
    exact_kl,
    grpo_loss,
    jensen_shannon,
    kl_divergence,
    kl_to_reference,
    response_means,
    skew_divergence,
    token_advantages,
)
from tests.models.float64_reference import jsd, kl, softmax
from tests.models.float64_reference import kl_to_reference as kl_estimate

LOSSES = [jensen_shannon, kl_divergence, skew_divergence]
COMPARISONS = [*LOSSES, exact_kl]
ESTIMATORS = ["k3", "clipped", "squared"]
logit = st.floats(-1e4, 1e4, width=32)


def pair(width: int) -> st.SearchStrategy[tuple[list[float], list[float]]]:
    row = st.lists(logit, min_size=width, max_size=width)
    return st.tuples(row, row)


pairs = st.integers(1, 8).flatmap(pair)


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("widths", [(50, 50), (50, 61), (61, 50)])
def test_jensen_shannon_is_the_formula(widths: tuple[int, int]) -> None:
    student, teacher = logits(7, widths[0]), logits(7, widths[1], seed=1)
    expected = jsd(student.double().numpy(), teacher.double().numpy())
    np.testing.assert_allclose(jensen_shannon(student, teacher).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_jensen_shannon_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, 0.0], [200.0, 0.0]]), torch.tensor([[200.0, 0.0], [0.0, 200.0]])
    m = 0.75 * math.log(0.75) + 0.25 * math.log(0.25)  # P = (1, 0), Q = (1/2, 1/2): H(M) - H(Q) / 2
    found = jensen_shannon(student, teacher)
    np.testing.assert_allclose(found.numpy(), [-m - math.log(2) / 2, math.log(2)], rtol=1e-6)


def test_kl_divergence_is_kl_of_teacher_from_student() -> None:
    student, teacher = logits(7, 50), logits(7, 50, seed=1)
    p, q = softmax(teacher.double().numpy()), softmax(student.double().numpy())
    np.testing.assert_allclose(kl_divergence(student, teacher).numpy(), kl(p, q), rtol=1e-5)
    assert np.abs(kl(p, q) - kl(q, p)).min() > 1e-3  # the direction shows


def test_kl_divergence_is_over_the_shared_vocabulary() -> None:
    student, teacher = logits(7, 50), logits(7, 61, seed=1)
    assert torch.equal(kl_divergence(student, teacher), kl_divergence(student, teacher[:, :50]))
    assert torch.equal(kl_divergence(teacher, student), kl_divergence(teacher[:, :50], student))


@given(pairs)
def test_jensen_shannon_is_symmetric_bounded_and_finite(rows: tuple[list[float], list[float]]) -> None:
    student, teacher = (torch.tensor([row]) for row in rows)
    student.requires_grad_()
    found = jensen_shannon(student, teacher)
    found.sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert -1e-6 <= found.item() <= math.log(2) + 1e-6
    assert math.isclose(found.item(), jensen_shannon(teacher, student.detach()).item(), abs_tol=1e-6)
    assert abs(jensen_shannon(teacher, teacher).item()) < 1e-6
    assert math.isclose(found.item(), jensen_shannon(student + 5, teacher).item(), abs_tol=2e-3)


@pytest.mark.parametrize("widths", [(5, 8), (8, 5), (6, 6)])
@pytest.mark.parametrize("loss", LOSSES)
def test_no_nan_with_padding_and_infinite_logits(loss, widths: tuple[int, int]) -> None:
    student, teacher = logits(4, widths[0]), logits(4, widths[1], seed=1)
    student[0] *= 1e30
    teacher[1] *= 1e30
    student[2, 3], teacher[2, 3], teacher[3, 1] = -math.inf, -math.inf, -math.inf
    student.requires_grad_()
    found = loss(student, teacher)
    assert not found.isnan().any()
    found.sum().backward()
    assert student.grad.isfinite().all()
    assert student.grad[1:].abs().sum(-1).gt(0).all()


@pytest.mark.parametrize("loss", COMPARISONS)
def test_only_the_student_has_a_gradient(loss) -> None:
    student, teacher = logits(3, 6).requires_grad_(), logits(3, 6, seed=1).requires_grad_()
    loss(student, teacher).sum().backward()
    assert teacher.grad is None
    step = 1e-2
    for t, v in [(0, 0), (1, 3), (2, 5)]:  # against central differences
        ends = []
        for sign in (1, -1):
            moved = student.detach().clone()
            moved[t, v] += sign * step
            ends.append(loss(moved, teacher.detach()).sum().item())
        assert math.isclose(student.grad[t, v].item(), (ends[0] - ends[1]) / (2 * step), rel_tol=2e-2, abs_tol=2e-4)


@pytest.mark.parametrize("loss", COMPARISONS)
def test_sixteen_bit_logits_are_summed_in_float32(loss) -> None:
    student, teacher = logits(3, 400).bfloat16(), logits(3, 400, seed=1).bfloat16()
    assert loss(student, teacher).dtype == torch.float32
    assert torch.equal(loss(student, teacher), loss(student.float(), teacher.float()))


def test_chosen_log_probs() -> None:
    x_TV, token_T = logits(5, 9), torch.tensor([0, 8, 3, 3, 1])
    expected = np.log(softmax(x_TV.double().numpy()))[np.arange(5), token_T.numpy()]
    np.testing.assert_allclose(chosen_log_probs(x_TV, token_T).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(st.lists(st.tuples(st.floats(-20, 0, width=32), st.floats(-20, 0, width=32)), min_size=1, max_size=9))
def test_kl_to_reference(estimator: str, rows: list[tuple[float, float]]) -> None:
    logp, reference = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    found = kl_to_reference(torch.tensor(logp), torch.tensor(reference), estimator).numpy()
    np.testing.assert_allclose(found, kl_estimate(logp, reference, estimator), rtol=1e-9, atol=1e-9)
    assert (found >= 0).all()
    assert not kl_to_reference(torch.tensor(logp), torch.tensor(logp), estimator).any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(st.floats(-80, 0, width=32), st.floats(-80, 0, width=32))
def test_derivative_of_kl_to_reference_is_bounded_except_for_k3(estimator: str, logp: float, reference: float) -> None:
    """For any stored token: the derivative of "clipped" is at most e - 1, that of "squared" at most |d|."""
    pi, d = torch.tensor([logp], requires_grad=True), reference - logp
    kl_to_reference(pi, torch.tensor([reference]), estimator).sum().backward()
    slopes = {"k3": 1 - np.exp(d), "clipped": 1 - np.exp(min(d, 1)), "squared": -d}
    assert pi.grad is not None and pi.grad.item() == pytest.approx(slopes[estimator], rel=1e-4, abs=1e-5)
    if estimator != "k3":
        assert abs(pi.grad.item()) <= max(math.e - 1, abs(d)) * 1.001


def test_exact_kl_is_kl_of_student_from_reference() -> None:
    student, reference = logits(7, 50), logits(7, 50, seed=1)
    q, r = softmax(student.double().numpy()), softmax(reference.double().numpy())
    np.testing.assert_allclose(exact_kl(student, reference).numpy(), kl(q, r), rtol=1e-5)
    assert np.abs(kl(q, r) - kl(r, q)).min() > 1e-3  # the direction shows


tokens = st.integers(2, 8).flatmap(
    lambda width: st.tuples(
        *(st.lists(st.floats(-40, 40, width=32), min_size=width, max_size=width),) * 2, st.integers(0, width - 1)
    )
)


def gradient_norm(term: torch.Tensor, student: torch.Tensor) -> float:
    """Return the 1-norm of a KL term's gradient with respect to one token's logits."""
    return torch.autograd.grad(term.sum(), student, retain_graph=True)[0].abs().sum().item()


@given(tokens)
def test_gradient_of_the_kl_term_is_bounded_on_any_stored_token(drawn: tuple[list[float], list[float], int]) -> None:
    """exact: sum_v q |x - KL| with x = log q - log r is at most E|x| + KL, and E|x| = KL + 2 E[x's negative part] is at
    most KL + 2, as q log(r / q) <= r - q; KL <= max_v -log r, a constant of the reference. clipped: e - 1 at most,
    squared: |d|, times the 2 of onehot - q."""
    student, reference = torch.tensor([drawn[0]], requires_grad=True), torch.tensor([drawn[1]])
    token_T = torch.tensor([drawn[2]])
    pi, pi_ref = chosen_log_probs(student, token_T), chosen_log_probs(reference, token_T)
    rarest = -reference.log_softmax(-1).min().item()
    bounds = {"clipped": 2 * (math.e - 1), "squared": 2 * abs((pi_ref - pi).item())}
    assert gradient_norm(exact_kl(student, reference), student) <= 2 * (1 + rarest) + 1e-3
    for estimator, bound in bounds.items():
        assert gradient_norm(kl_to_reference(pi, pi_ref, estimator), student) <= bound + 1e-3


@pytest.mark.parametrize("given_up", [20.0, 40.0])
def test_gradient_of_k3_is_not_bounded(given_up: float) -> None:
    """For a token that is likely to the reference and very unlikely to the student."""
    student, reference = torch.tensor([[-given_up, 0.0, 0.0]], requires_grad=True), torch.zeros(1, 3)
    token_T = torch.tensor([0])
    k3 = kl_to_reference(chosen_log_probs(student, token_T), chosen_log_probs(reference, token_T), "k3")
    assert gradient_norm(k3, student) > math.exp(given_up - 2)
    assert gradient_norm(exact_kl(student, reference), student) <= 2 * (1 + math.log(3))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_response_means(lengths: list[int], random) -> None:
    response = [r for r, n in enumerate(lengths) for _ in range(n)]
    random.shuffle(response)  # tokens in any order
    value = [random.uniform(-9, 9) for _ in response]
    expected = [np.mean([v for v, r in zip(value, response, strict=True) if r == j]) for j in range(len(lengths))]
    found = response_means(torch.tensor(value, dtype=torch.float64), torch.tensor(response), len(lengths))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    logp_T = -torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0], dtype=torch.float64)
    reference_T = -torch.tensor([0.7, 0.5, 2.0, 0.4, 2.0], dtype=torch.float64)
    return logp_T.requires_grad_(), reference_T, torch.tensor([1.5, -0.5]).double(), torch.tensor([0, 0, 0, 1, 1])


def example_loss(
    logp_T: torch.Tensor, reference_T: torch.Tensor, advantage_R: torch.Tensor, response_T: torch.Tensor, beta: float
) -> torch.Tensor:
    advantage_T = token_advantages(Terms(logp_T, logp_T), advantage_R[response_T], "full")
    kl_T = kl_to_reference(logp_T, reference_T, "k3")
    return grpo_loss(logp_T, advantage_T, kl_T, response_T, len(advantage_R), beta)


def test_grpo_loss_is_the_formula() -> None:
    logp_T, reference_T, advantage_R, response_T = example()
    d = (reference_T - logp_T).detach().numpy()
    gain = advantage_R.numpy()[response_T] - 0.1 * (np.exp(d) - d - 1)  # the ratio is 1 in value
    expected = [-gain[:3].mean(), -gain[3:].mean()]
    found = example_loss(logp_T, reference_T, advantage_R, response_T, 0.1).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_grpo_gradient_is_the_advantage_times_the_gradient_of_log_pi() -> None:
    logp_T, reference_T, advantage_R, response_T = example()
    advantage_R.requires_grad_()
    example_loss(logp_T, reference_T, advantage_R, response_T, 0.0).sum().backward()
    torch.testing.assert_close(logp_T.grad, -advantage_R.detach()[response_T] / torch.tensor([3, 3, 3, 2, 2]))
    assert advantage_R.grad is None


def test_grpo_penalty_pulls_towards_the_reference() -> None:
    logp_T, reference_T, _, response_T = example()
    example_loss(logp_T, reference_T, torch.zeros(2).double(), response_T, 0.1).sum().backward()
    pull = torch.sign(reference_T - logp_T.detach())
    assert torch.equal(torch.sign(-logp_T.grad), pull)
