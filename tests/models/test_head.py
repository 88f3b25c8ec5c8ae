"""The chunked head against whole logits, and its gradient against finite differences."""

import numpy as np
import pytest
import torch

from masters.models import head, losses
from masters.models.head import Projection

T, H_STUDENT, H_TEACHER = 13, 8, 12
WIDTHS = {"equal": (50, 50), "student padded": (57, 50), "teacher padded": (50, 57)}


def projections(widths: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Projection, Projection]:
    generator = torch.Generator().manual_seed(1)

    def made(width: int, vocabulary: int) -> Projection:
        parts = torch.randn(T, width, generator=generator), torch.randn(vocabulary, width, generator=generator)
        return Projection(*(part.to(dtype).requires_grad_() for part in parts))

    return made(H_STUDENT, widths[0]), made(H_TEACHER, widths[1])


TOKEN_T = torch.arange(T) * 3
SLOPES = torch.randn(2, T, generator=torch.Generator().manual_seed(2))


def pull(found: losses.Terms, student: Projection) -> tuple[torch.Tensor, ...]:
    """Values, and gradients of a sum that weighs every token's two terms unlike."""
    total = (SLOPES[0] * found.logp_T + SLOPES[1] * found.divergence_T).sum()
    slopes = torch.autograd.grad(total, (student.hidden_TH, student.weight_VH))
    return found.logp_T.detach(), found.divergence_T.detach(), *slopes


@pytest.fixture(params=[1, 4, 5, 13, 100], ids="{} tokens a chunk".format)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", request.param * 4 * 57)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("divergence", ["jsd", "kl", "skew"])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_chunks_give_what_whole_logits_give(widths: tuple[int, int], divergence: str) -> None:
    student, teacher = projections(widths)
    dense = pull(losses.terms(student.logits(), teacher.logits(), TOKEN_T, divergence), student)
    chunked = pull(head.terms(student, teacher, TOKEN_T, divergence), student)
    for name, expected, found in zip(("log pi", "D", "hidden's slope", "weight's"), dense, chunked, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(1.0, scale), msg=lambda m, n=name: n + m)


@pytest.mark.usefixtures("chunk")
def test_without_a_teacher_it_is_the_tokens_log_probability() -> None:
    student, _ = projections((50, 50))
    dense, chunked = (
        (values.detach(), *torch.autograd.grad((SLOPES[0] * values).sum(), (student.hidden_TH, student.weight_VH)))
        for values in (
            losses.chosen_log_probs(student.logits(), TOKEN_T),
            head.chosen_log_probs(student, TOKEN_T),
        )
    )
    for expected, found in zip(dense, chunked, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("divergence", ["jsd", "kl", "skew"])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_the_slope_is_that_of_finite_differences(widths: tuple[int, int], divergence: str) -> None:
    student, teacher = projections(widths)
    found = pull(head.terms(student, teacher, TOKEN_T, divergence), student)[2]
    generator, step = torch.Generator().manual_seed(3), 1e-2
    for _ in range(4):
        along = torch.randn(T, H_STUDENT, generator=generator)

        def total(sign: int, along: torch.Tensor = along) -> float:
            moved = Projection(student.hidden_TH.detach() + sign * step * along, student.weight_VH)
            values = losses.terms(moved.logits().double(), teacher.logits().double(), TOKEN_T, divergence)
            return (SLOPES[0] * values.logp_T + SLOPES[1] * values.divergence_T).sum().item()

        measured = (total(1) - total(-1)) / (2 * step)
        np.testing.assert_allclose((found * along).sum().item(), measured, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("noise", [0.0, 0.01, 1.0])
def test_a_large_vocabulary_loses_no_digits(noise: float) -> None:
    """Against float64; rewards ask for the order of divergences that lie closer than 1e-5 to each other."""
    generator, vocabulary = torch.Generator().manual_seed(4), 151_936
    s, t = 3 * torch.randn(2, 4, vocabulary, generator=generator)
    t = s + noise * t
    q, p = (x.double().log_softmax(-1) for x in (s, t))
    m = torch.logaddexp(q, p) - losses.LN2
    expected = 0.5 * ((q.exp() * (q - m)).sum(-1) + (p.exp() * (p - m)).sum(-1))
    found, _ = head.JensenShannon.value(*(x - x.logsumexp(-1, keepdim=True) for x in (s, t)))
    np.testing.assert_allclose(found, expected, atol=3e-7, rtol=0)


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = projections((50, 50))
    head.terms(student, teacher, TOKEN_T, "jsd").divergence_T.sum().backward()
    assert student.hidden_TH.grad is not None
    assert teacher.hidden_TH.grad is None and teacher.weight_VH.grad is None


def test_equal_models_diverge_nowhere_and_pull_nowhere() -> None:
    student, _ = projections((50, 50))
    same = Projection(student.hidden_TH.detach(), student.weight_VH.detach())
    value_T = head.terms(student, same, TOKEN_T, "jsd").divergence_T
    value_T.sum().backward()
    assert student.hidden_TH.grad is not None
    assert value_T.detach().abs().max() < 1e-6
    assert student.hidden_TH.grad.abs().max() < 1e-6


@pytest.mark.parametrize("gap", [30.0, 1000.0])
def test_distributions_far_apart_diverge_by_ln_2(gap: float) -> None:
    """One-hot and other one-hot: no infinity, no NaN, in value or slope."""
    weight = gap * torch.eye(4)
    student = Projection(torch.eye(4)[[0]].requires_grad_(), weight.clone().requires_grad_())
    value_T = head.terms(student, Projection(torch.eye(4)[[1]], weight), torch.tensor([0]), "jsd").divergence_T
    value_T.sum().backward()
    torch.testing.assert_close(value_T.detach(), torch.tensor([losses.LN2]))
    assert student.hidden_TH.grad is not None and student.weight_VH.grad is not None
    assert student.hidden_TH.grad.isfinite().all() and student.weight_VH.grad.isfinite().all()


def test_bfloat16_weights_have_float32_sums() -> None:
    student, teacher = projections((50, 50), torch.bfloat16)
    found = head.terms(student, teacher, TOKEN_T, "jsd")
    assert found.logp_T.dtype == found.divergence_T.dtype == torch.float32
    exact = losses.terms(student.logits(), teacher.logits(), TOKEN_T, "jsd")  # logits rounded to bfloat16 alike
    torch.testing.assert_close(found.logp_T, exact.logp_T)
    torch.testing.assert_close(found.divergence_T, exact.divergence_T)
    got, dense = (pull(terms, student)[2:] for terms in (found, exact))
    for one, other in zip(got, dense, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other, rtol=0.03, atol=0.03)
