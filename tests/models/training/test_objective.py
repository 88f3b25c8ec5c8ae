"""The objective against the float64 reference, and properties that hold for any numbers."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from masters.config import Train
from masters.models.losses import formulas
from masters.models.training import objective
from tests.models import float64_reference
from tests.models.compare_with_reference import (
    VARIANTS,
    Shape,
    awkward,
    check_fine_tuning,
    check_objective,
    check_responses,
    close,
    dense_terms,
    draw,
    packed,
    tensors,
)
from tests.models.float64_reference import Batch
from tests.models.paper import paper_rewards, paper_train

NAN = math.nan
response = st.tuples(st.integers(1, 4), st.sampled_from([0.0, 1.0, 0.25, NAN]))
shapes = st.lists(st.lists(response, min_size=1, max_size=6), min_size=1, max_size=4)


@st.composite
def batches(draw_from: st.DrawFn) -> Batch:
    shape = draw_from(shapes)
    later = [(q, j) for q, one in enumerate(shape) for j in range(1, len(one))]
    repeats = draw_from(st.sets(st.sampled_from(later), max_size=3)) if later else set()
    for q, j in sorted(repeats):  # a repeated response is as long as the one before it
        shape[q][j] = (shape[q][j - 1][0], shape[q][j][1])
    widths = draw_from(st.sampled_from([(11, 11), (9, 12), (12, 9)]))
    return draw(shape, repeats, draw_from(st.integers(0, 2**32 - 1)), widths)


def is_well_separated(batch: Batch) -> bool:
    """Return whether divergences of a question are equal or well apart: min-max scaling enlarges a small difference."""
    result = float64_reference.objective(batch, rewards=paper_rewards(distillation="raw"))
    groups = np.split(result.distill_R, np.cumsum([len(one) for one in batch.questions])[:-1])
    spreads = [np.ptp(d[~np.isnan(s)]) for d, s in zip(groups, batch.scores, strict=True) if not np.isnan(s).all()]
    return all(spread < 1e-12 or spread > 1e-2 for spread in spreads)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=15)
@given(batch=batches())
def test_equals_the_reference(variant: str, batch: Batch) -> None:
    assume(is_well_separated(batch))
    check_objective(batch, *VARIANTS[variant])
    check_responses(batch, *VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=15)
@given(batch=batches(), seed=st.integers(0, 2**32 - 1))
def test_with_masked_responses_equals_the_reference(variant: str, batch: Batch, seed: int) -> None:
    """A masked response counts in the rewards of its group, as without the mask, but has no weight in the loss."""
    assume(is_well_separated(batch))
    is_trained_R = np.random.default_rng(seed).random(sum(map(len, batch.questions))) < 0.5
    outcome = check_objective(batch, *VARIANTS[variant], is_trained_R)
    unmasked = check_objective(batch, *VARIANTS[variant])
    for name in ("divergence", "reward_accuracy", "reward_distillation", "reward"):
        np.testing.assert_array_equal(outcome.responses[name], unmasked.responses[name])
    advantage_R = np.array(unmasked.responses["advantage"])
    np.testing.assert_array_equal(outcome.responses["advantage"], np.where(is_trained_R, advantage_R, 0))
    groups = np.split(advantage_R * is_trained_R, np.cumsum([len(one) for one in batch.questions])[:-1])
    assert outcome.sums["questions_with_advantage"] == sum(group.any() for group in groups)


@pytest.mark.parametrize("kind", ["masters", "kd", "sft"])
def test_a_masked_response_has_no_gradient(kind: str) -> None:
    batch, pack = awkward(), packed(awkward())
    (student, teacher, pi_ref, score_R), train = tensors(batch), paper_train()
    is_trained_R = torch.arange(pack.responses) % 3 > 0
    terms = dense_terms(student, teacher, pi_ref, pack, train)
    if kind == "masters":
        outcome = objective.masters_loss(terms, score_R, pack, train, paper_rewards(), None, is_trained_R)
    elif kind == "kd":
        outcome = objective.distillation(terms, pack, is_trained_R)
        divergence_R = np.where(is_trained_R, outcome.responses["divergence"], 0)
        means = [divergence_R[members].mean() for members in pack.responses_by_question]
        assert outcome.loss.item() == pytest.approx(sum(means), rel=1e-5)
        assert outcome.sums["divergence"] > outcome.loss.item()  # measured on all responses
    else:
        outcome = objective.supervised(terms.logp_T, pack, score_R, is_trained_R)
    outcome.loss.backward()
    assert student.grad is not None
    has_gradient_T = student.grad.abs().sum(-1) > 0
    expected_R = is_trained_R & (score_R >= 0.5) if kind == "sft" else is_trained_R
    assert has_gradient_T.tolist() == expected_R[pack.response_T].tolist()


def test_distillation_and_supervision_alone_equal_the_reference() -> None:
    batch = awkward()
    shares = np.zeros(len(batch.token_T))
    for tokens in float64_reference.token_spans(batch):
        for t in tokens:
            shares[t] = 1 / (t.stop - t.start) / len(tokens)
    kinds = {
        "kd": lambda logits: float64_reference.jsd(logits, batch.teacher_TV),
        "sft": lambda logits: -float64_reference.log_pi(logits, batch.token_T),
    }
    for kind, terms in kinds.items():
        student, teacher, pi_ref, _ = tensors(batch)
        if kind == "kd":
            train = paper_train(objective="kd")
            outcome = objective.distillation(dense_terms(student, teacher, pi_ref, packed(batch), train), packed(batch))
        else:
            logp_T = formulas.chosen_log_probs(student, packed(batch).token_T)
            outcome = objective.supervised(logp_T, packed(batch))
        outcome.loss.backward()
        assert teacher.grad is None
        close(outcome.loss, (shares * terms(batch.student_TV)).sum(), kind)
        close(student.grad, shares[:, None] * float64_reference.numerical_gradient(terms, batch.student_TV), kind)


def test_the_policy_ratio_is_one_and_its_gradient_the_advantage_times_that_of_log_pi() -> None:
    batch, pack = awkward(), packed(awkward())
    student, *_ = tensors(batch)
    advantage_R = torch.linspace(-2, 2, pack.responses)
    logp_T = formulas.chosen_log_probs(student, pack.token_T)
    loss_R = formulas.grpo_loss(
        logp_T, advantage_R[pack.response_T], torch.zeros_like(logp_T), pack.response_T, pack.responses, beta=0.0
    )
    close(loss_R, -advantage_R.numpy(), "a ratio other than 1")
    loss_R.sum().backward()
    count_T = np.bincount(pack.response_T)[pack.response_T]
    a_T, old_T = advantage_R.numpy()[pack.response_T], float64_reference.log_pi(batch.student_TV, batch.token_T)
    surrogate = float64_reference.numerical_gradient(
        lambda logits: np.exp(float64_reference.log_pi(logits, batch.token_T) - old_T) * a_T, batch.student_TV
    )
    close(student.grad, -surrogate / count_T[:, None], "against finite differences")
    chosen = np.eye(batch.student_TV.shape[1])[batch.token_T]
    by_hand = a_T[:, None] * (chosen - float64_reference.softmax(batch.student_TV))
    close(student.grad, -by_hand / count_T[:, None], "against A (1[v = token] - pi)")


@pytest.mark.parametrize("shift", [-1.0, 0.5, 3.0])
def test_a_shift_of_all_rewards_changes_nothing(shift: float) -> None:
    batch, gradients, values = awkward(), [], []
    for moved in (0.0, shift):
        student, teacher, pi_ref, score_R = tensors(batch)
        terms = dense_terms(student, teacher, pi_ref, packed(batch), paper_train())
        outcome = objective.masters_loss(terms, score_R + moved, packed(batch), paper_train(), paper_rewards())
        outcome.loss.backward()
        gradients.append(student.grad)
        values.append(outcome.loss.detach())
    torch.testing.assert_close(values[0], values[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


DEGENERATE: dict[str, tuple[Shape, set[tuple[int, int]]]] = {
    "one response": ([[(3, 1.0)]], set()),
    "the same response throughout": ([[(2, 1.0)] * 4], {(0, 1), (0, 2), (0, 3)}),
    "no verdicts": ([[(2, NAN), (3, NAN), (1, NAN)]], set()),
    "one verdict": ([[(2, NAN), (3, 1.0), (1, NAN)]], set()),
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("variant", ["method", "raw"])
def test_degenerate_groups_have_no_advantage_and_no_nan(case: str, variant: str) -> None:
    train, rewards = VARIANTS[variant]
    shape, repeats = DEGENERATE[case]
    batch = draw(shape, repeats, seed=2)
    student, teacher, pi_ref, score_R = tensors(batch)
    terms = dense_terms(student, teacher, pi_ref, packed(batch), train)
    divergence_R = objective.divergences(terms, packed(batch))
    distill_R, advantage_R = objective.advantages(divergence_R, score_R, packed(batch), rewards)
    assert advantage_R.tolist() == [0.0] * packed(batch).responses
    assert distill_R.isfinite().all()
    outcome = objective.masters_loss(terms, score_R, packed(batch), train, rewards)
    outcome.loss.backward()
    assert outcome.loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad.abs().sum(-1).gt(0).all()  # the divergence still pulls at every token
    assert all(map(math.isfinite, outcome.sums.values()))


@settings(max_examples=30)
@given(batch=batches())
def test_fine_tuning_on_right_responses_equals_the_reference(batch: Batch) -> None:
    check_fine_tuning(batch)
    check_fine_tuning(batch, np.arange(sum(map(len, batch.questions))) % 2 > 0)


def test_fine_tuning_on_responses_logs_their_accuracy() -> None:
    batch = draw([[(1, 1.0), (2, 0.25), (1, NAN)], [(3, 0.5)]], set(), seed=2)
    (student, _, _, score_R), pack = tensors(batch), packed(batch)
    logp_T = formulas.chosen_log_probs(student, pack.token_T)
    assert objective.supervised(logp_T, pack, score_R).sums["reward_accuracy"] == pytest.approx(1.25 / 3 + 0.5)
    assert objective.supervised(logp_T, pack).sums.keys() == {"loss"}


def test_fine_tuning_without_a_right_response_has_no_gradient() -> None:
    batch = draw([[(3, 0.0), (1, NAN)]], set(), seed=2)
    student, _, _, score_R = tensors(batch)
    outcome = objective.supervised(formulas.chosen_log_probs(student, packed(batch).token_T), packed(batch), score_R)
    outcome.loss.backward()
    assert outcome.loss == 0 and not student.grad.any()


@pytest.mark.parametrize("divergence", get_args(Train.model_fields["divergence"].annotation))
@pytest.mark.parametrize("kind", get_args(Train.model_fields["objective"].annotation))
def test_no_configuration_leaves_a_question_without_a_gradient(kind: str, divergence: str) -> None:
    """This holds even with equal rewards, because D is always in the loss: no question is skipped."""
    train = Train.model_validate(
        dict(
            objective=kind,
            divergence=divergence,
            balance="sum",
            targets="labels" if kind == "sft" else "responses",
        )
    )
    batch = draw([[(3, 1.0), (2, 1.0)], [(2, 0.0), (1, 0.0)]], set(), seed=4)
    (student, teacher, pi_ref, score_R), pack = tensors(batch), packed(batch)
    terms = dense_terms(student, teacher, pi_ref, pack, train)
    if kind == "masters":
        outcome = objective.masters_loss(terms, score_R, pack, train, paper_rewards(distillation="off"))
        assert outcome.sums["questions_with_advantage"] == 0
    elif kind == "kd":
        outcome = objective.distillation(terms, pack)
    else:
        outcome = objective.supervised(terms.logp_T, pack)
    outcome.loss.backward()
    assert student.grad is not None and student.grad.abs().sum(-1).gt(1e-6).all()


@pytest.mark.parametrize(("scores", "shared"), [([1.0] * 8, False), ([0.0] * 8, True)])
def test_with_equal_verdicts_the_divergence_decides(scores: list[float], shared: bool) -> None:
    shape: Shape = [[(2, score) for score in scores]]
    batch = draw(shape, {(0, j) for j in range(1, 8)} if shared else set(), seed=3)
    student, teacher, pi_ref, score_R = tensors(batch)
    divergence_R = objective.divergences(
        dense_terms(student, teacher, pi_ref, packed(batch), paper_train()), packed(batch)
    )
    _, advantage_R = objective.advantages(divergence_R, score_R, packed(batch), paper_rewards())
    assert bool(advantage_R.any()) is not shared
    if not shared:
        assert advantage_R.argmax() == divergence_R.argmin()


def test_rewards_do_not_depend_on_other_questions_of_the_batch() -> None:
    """The rewards of a batch equal those of each question alone."""
    batch = awkward()
    student, teacher, pi_ref, score_R = tensors(batch)
    pack = packed(batch)
    divergence_R = objective.divergences(dense_terms(student, teacher, pi_ref, pack, paper_train()), pack).detach()
    together = objective.advantages(divergence_R, score_R, pack, paper_rewards())
    for question, responses in enumerate(batch.questions):
        of = pack.question_R == question
        single = Batch([responses], [batch.scores[question]], *(np.empty(0),) * 3)
        alone = objective.advantages(divergence_R[of], score_R[of], packed(single), paper_rewards())
        assert all(torch.equal(whole[of], separate) for whole, separate in zip(together, alone, strict=True))


def test_equal_models_have_no_divergence_and_no_gradient() -> None:
    student, _, _, _ = tensors(awkward())
    value_T = formulas.jensen_shannon(student, student.detach().clone())
    value_T.sum().backward()
    assert student.grad is not None
    assert value_T.detach().abs().max() < 1e-6
    assert student.grad.abs().max() < 1e-6
