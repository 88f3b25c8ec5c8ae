"""The chunked head against full logits, and its gradient against finite differences.

Shapes: T tokens, H hidden size.
"""

import numpy as np
import pytest
import torch

from masters.models.losses import chunked_head, formulas
from masters.models.losses.chunked_head import Projection

T, H_STUDENT, H_TEACHER = 13, 8, 12
WIDTHS = {"equal": (50, 50), "student padded": (57, 50), "teacher padded": (50, 57)}


def make_projections(
    widths: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 1
) -> tuple[Projection, Projection]:
    generator = torch.Generator().manual_seed(seed)

    def made(width: int, vocabulary: int) -> Projection:
        parts = torch.randn(T, width, generator=generator), torch.randn(vocabulary, width, generator=generator)
        return Projection(*(part.to(dtype).requires_grad_() for part in parts))

    return made(H_STUDENT, widths[0]), made(H_TEACHER, widths[1])


def make_reference(widths: tuple[int, int], dtype: torch.dtype = torch.float32) -> Projection:
    """Make a second model with the student's vocabulary."""
    return make_projections(widths, dtype, seed=5)[0]


TOKEN_T = torch.arange(T) * 3
WEIGHTS = torch.randn(3, T, generator=torch.Generator().manual_seed(2))
TERMS = (
    "log pi",
    "D",
    "KL",
    "log pi_ref",
    "entropy",
    "||onehot - pi||^2",
    "greedy",
    "gradient of hidden",
    "gradient of weight",
)


def weighted_sum(found: formulas.Terms) -> torch.Tensor:
    """Return a sum of every token's three terms with different weights."""
    assert found.kl_T is not None
    return (WEIGHTS[0] * found.logp_T + WEIGHTS[1] * found.divergence_T + WEIGHTS[2] * found.kl_T).sum()


def terms_and_gradients(found: formulas.Terms, student: Projection) -> tuple[torch.Tensor, ...]:
    """Return the values of the terms, and the gradients of `weighted_sum`."""
    slopes = torch.autograd.grad(weighted_sum(found), (student.hidden_TH, student.weight_VH))
    return *(value_T.detach().float() for value_T in vars(found).values()), *slopes


@pytest.fixture(params=[1, 4, 5, 13, 100], ids="{} tokens a chunk".format)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_head, "CHUNK_BYTES", request.param * 4 * 57)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("divergence", ["jsd", "kl", "skew"])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_chunks_give_the_terms_and_gradients_of_full_logits(widths: tuple[int, int], divergence: str) -> None:
    (student, teacher), reference = make_projections(widths), make_reference(widths)
    whole = formulas.token_terms(student.logits(), teacher.logits(), TOKEN_T, divergence, reference.logits())
    chunked = terms_and_gradients(chunked_head.token_terms(student, teacher, TOKEN_T, divergence, reference), student)
    for name, expected, found in zip(TERMS, terms_and_gradients(whole, student), chunked, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(1.0, scale), msg=lambda m, n=name: n + m)


@pytest.mark.usefixtures("chunk")
def test_chosen_log_probs_equal_those_of_full_logits() -> None:
    student, _ = make_projections((50, 50))
    dense, chunked = (
        (values.detach(), *torch.autograd.grad((WEIGHTS[0] * values).sum(), (student.hidden_TH, student.weight_VH)))
        for values in (
            formulas.chosen_log_probs(student.logits(), TOKEN_T),
            chunked_head.chosen_log_probs(student, TOKEN_T),
        )
    )
    for expected, found in zip(dense, chunked, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("divergence", ["jsd", "kl", "skew"])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_gradient_equals_finite_differences(widths: tuple[int, int], divergence: str) -> None:
    (student, teacher), reference = make_projections(widths), make_reference(widths)
    found = terms_and_gradients(chunked_head.token_terms(student, teacher, TOKEN_T, divergence, reference), student)[-2]
    generator, step = torch.Generator().manual_seed(3), 1e-2
    for _ in range(4):
        along = torch.randn(T, H_STUDENT, generator=generator)

        def total(sign: int, along: torch.Tensor = along) -> float:
            moved = Projection(student.hidden_TH.detach() + sign * step * along, student.weight_VH)
            logits = (one.logits().double() for one in (moved, teacher, reference))
            own, taught, known = logits
            return weighted_sum(formulas.token_terms(own, taught, TOKEN_T, divergence, known)).item()

        measured = (total(1) - total(-1)) / (2 * step)
        np.testing.assert_allclose((found * along).sum().item(), measured, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("noise", [0.0, 0.01, 1.0])
def test_divergence_is_exact_over_a_large_vocabulary(noise: float) -> None:
    """Against float64; rewards depend on the order of divergences that differ by less than 1e-5."""
    generator, vocabulary = torch.Generator().manual_seed(4), 151_936
    s, t = 3 * torch.randn(2, 4, vocabulary, generator=generator)
    t = s + noise * t
    q, p = (x.double().log_softmax(-1) for x in (s, t))
    m = torch.logaddexp(q, p) - formulas.LN2
    expected = 0.5 * ((q.exp() * (q - m)).sum(-1) + (p.exp() * (p - m)).sum(-1))
    found, _ = chunked_head.JensenShannon.value(*(x - x.logsumexp(-1, keepdim=True) for x in (s, t)))
    np.testing.assert_allclose(found, expected, atol=3e-7, rtol=0)


def test_no_gradient_reaches_teacher_or_reference() -> None:
    (student, teacher), reference = make_projections((50, 50)), make_reference((50, 50))
    found = chunked_head.token_terms(student, teacher, TOKEN_T, "jsd", reference)
    assert found.reference_logp_T is not None and not found.reference_logp_T.requires_grad
    weighted_sum(found).backward()
    assert student.hidden_TH.grad is not None
    for frozen in (teacher, reference):
        assert frozen.hidden_TH.grad is None and frozen.weight_VH.grad is None


def test_without_a_reference_there_is_no_kl_term() -> None:
    found = chunked_head.token_terms(*make_projections((50, 50)), TOKEN_T, "jsd")
    assert found.kl_T is None and found.reference_logp_T is None


def test_equal_models_have_no_divergence_and_no_gradient() -> None:
    student, _ = make_projections((50, 50))
    same = Projection(student.hidden_TH.detach(), student.weight_VH.detach())
    terms = chunked_head.token_terms(student, same, TOKEN_T, "jsd", same)
    assert terms.kl_T is not None
    value_T = terms.divergence_T + terms.kl_T
    value_T.sum().backward()
    assert student.hidden_TH.grad is not None
    assert value_T.detach().abs().max() < 1e-6
    assert student.hidden_TH.grad.abs().max() < 1e-6


@pytest.mark.parametrize("gap", [30.0, 1000.0])
def test_distributions_far_apart_diverge_by_ln_2(gap: float) -> None:
    """Two different one-hot distributions: neither value nor gradient is infinite or NaN."""
    weight = gap * torch.eye(4)
    student = Projection(torch.eye(4)[[0]].requires_grad_(), weight.clone().requires_grad_())
    value_T = chunked_head.token_terms(
        student, Projection(torch.eye(4)[[1]], weight), torch.tensor([0]), "jsd"
    ).divergence_T
    value_T.sum().backward()
    torch.testing.assert_close(value_T.detach(), torch.tensor([formulas.LN2]))
    assert student.hidden_TH.grad is not None and student.weight_VH.grad is not None
    assert student.hidden_TH.grad.isfinite().all() and student.weight_VH.grad.isfinite().all()


def test_bfloat16_weights_have_float32_sums() -> None:
    (student, teacher), reference = make_projections((50, 50), torch.bfloat16), make_reference((50, 50), torch.bfloat16)
    found = chunked_head.token_terms(student, teacher, TOKEN_T, "jsd", reference)
    # logits rounded to bfloat16 alike
    exact = formulas.token_terms(student.logits(), teacher.logits(), TOKEN_T, "jsd", reference.logits())
    got, dense = (terms_and_gradients(terms, student) for terms in (found, exact))
    for one, other in zip(got[:-2], dense[:-2], strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other)
    for one, other in zip(got[-2:], dense[-2:], strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other, rtol=0.03, atol=0.03)
