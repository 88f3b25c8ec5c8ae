"""Gradients through tiny random models: where they flow, and that packing and accumulation do not change them.

B rows, L packed length, H width of the model, R responses.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from demo import families
from masters.config import Train
from masters.models.losses import chunked_head, formulas
from masters.models.masking import group_thresholds, iterate_tensors
from masters.models.model_loading import load_model
from masters.models.packing import packed_batch, prefix_tree
from masters.models.packing.packed_batch import pack, response_logits, response_states
from masters.models.packing.prefix_tree import Question
from masters.models.training import objective, step_metrics, trainer
from masters.models.training.groups import Step
from masters.store.storage import Storage
from tests.models import family_questions, float64_reference, tiny_models
from tests.models.compare_with_reference import close
from tests.models.float64_reference import Batch
from tests.models.mutation import Edit, mutate
from tests.models.paper import paper_rewards, paper_train
from tests.models.tiny_contexts import LENGTHS, gradient, make_context, packed, references

SIDES = [(64, 64), (120, 60), (56, 180)]


def masked_model(folder: Path, ratio: float) -> torch.nn.Module:
    rows = group_thresholds(lambda: iterate_tensors(folder), [ratio], "matrix")
    return family_questions.load_masked(folder, {row["tensor"]: row["threshold"] for row in rows}, "float32")


@pytest.fixture(params=families.NAMES)
def context(request: pytest.FixtureRequest) -> trainer.TrainContext:
    return make_context(request.param)


def stored(context: trainer.TrainContext) -> trainer.TrainContext:
    """Return the same context with a KL term from stored log pi_ref."""
    return replace(context, train=paper_train(kl="squared"), reference=None)


def alone(model: torch.nn.Module, question: Question, response: list[int]) -> torch.Tensor:
    """Return the logits that predict a response's tokens, from a forward pass of prompt and response alone."""
    ids = torch.cat([question.prompt["input_ids"], torch.tensor([response])], 1)
    inputs = {k: v for k, v in question.prompt.items() if k in ("pixel_values", "image_grid_thw")}
    if model.config.model_type.startswith("qwen"):
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits
    return logits[0, -len(response) - 1 : -1]


def check_logits(context: trainer.TrainContext) -> None:
    """Check that packed logits equal those of every response alone."""
    everything = list(range(len(context.groups)))
    with torch.no_grad():
        questions = [context.question(context.groups[g]) for g in everything]
        together = response_logits(context.student, packed_batch.pack(questions, context.student, context.family))
        apart = torch.cat([alone(context.student, q, r) for q in questions for r in q.responses])
    torch.testing.assert_close(together, apart, atol=2e-5, rtol=1e-4)


def check_accumulation(
    context: trainer.TrainContext, monkeypatch: pytest.MonkeyPatch, worlds: tuple[int, ...] = (1, 8, 3)
) -> None:
    """Check that one process with eight questions equals eight with one each: gradients are summed."""
    monkeypatch.setattr(
        trainer, "sum_over_ranks", lambda context, sums: sums
    )  # gradients add up in the one student instead
    step, ref, found = Step(0, 0, tuple(range(8))), references(context), []
    for world in worlds:
        context.student.zero_grad()
        ranks = [trainer.run_step(replace(context, rank=rank, world=world), step, ref) for rank in range(world)]
        found.append((gradient(context.student), step_metrics.merge(ranks)))
    context.student.zero_grad()
    (expected, sums), *others = found
    assert expected.norm() > 1e-3
    for other, other_sums in others:
        assert (other - expected).norm() / expected.norm() < 2e-5
        assert other_sums == pytest.approx(sums, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", families.NAMES)
def test_packed_gradients_equal_those_of_separate_sequences(name: str, tied: bool, tmp_path: Path) -> None:
    """One sequence per response and full logits give the same gradient; images of several sizes, real processors.

    Without R_distill: min-max stretches the little that random models' D differ by, and its rounding with it.
    """
    folder = families.save(name, tmp_path, ["what shape is it now?"], "teacher", tied)
    student, teacher = load_model(folder, "float32"), masked_model(folder, 0.2)
    made = family_questions.questions(folder, [SIDES[n % len(SIDES)] for n in range(len(LENGTHS))], LENGTHS, (10, 260))
    context = replace(
        make_context(name), student=student, teacher=teacher, reference=masked_model(folder, 0.4),
        rewards=paper_rewards(distillation="off"),
        question=lambda group: made[group.ref.row],
    )  # fmt: skip
    everything = list(range(len(context.groups)))
    batch = packed(context, everything)
    trainer.batch_outcome(context, batch, everything, {}).loss.backward()
    found = gradient(student)
    student.zero_grad()
    questions = [context.question(context.groups[g]) for g in everything]
    own, *others = [
        torch.cat([alone(m, q, r) for q in questions for r in q.responses])
        for m in (student, teacher, context.reference)
    ]
    taught, known = (logits.detach() for logits in others)
    terms = formulas.token_terms(own, taught, batch.token_T, "jsd", known)
    score_R = torch.from_numpy(np.concatenate([group.scores for group in context.groups])).float()
    objective.masters_loss(terms, score_R, batch, context.train, context.rewards).loss.backward()
    expected = gradient(student)
    assert expected.norm() > 1e-3
    assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("kept", [False, True], ids=["held", "stored"])
def test_a_small_token_budget_gives_the_same_gradient(context: trainer.TrainContext, kept: bool) -> None:
    context, found = stored(context) if kept else context, []
    for budget in (10_000, 60, 1):
        sums = trainer.run_step(replace(context, token_budget=budget), Step(0, 0, tuple(range(8))), references(context))
        found.append((gradient(context.student), sums))
        context.student.zero_grad()
    for other, sums in found[1:]:
        assert (other - found[0][0]).norm() / found[0][0].norm() < 2e-5
        assert sums == pytest.approx(found[0][1], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "targets"), [("masters", "responses"), ("kd", "responses"), ("sft", "labels"), ("sft", "responses")]
)
def test_eight_batches_of_one_give_the_gradient_of_one_batch_of_eight(
    context: trainer.TrainContext, kind: str, targets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = Train.model_validate(dict(objective=kind, targets=targets))
    check_accumulation(replace(context, train=train), monkeypatch)


FAULTS: dict[str, Edit] = {
    "responses see each other": (packed_batch, "is_visible", "(key_response == 0) |", "(key_response >= 0) |"),
    "questions of one image see each other": (
        packed_batch,
        "is_visible",
        "(key_question == 0) |",
        "(key_question >= 0) |",
    ),
    "images in a row see each other": (packed_batch, "is_visible", "(key_image == image)", "(key_image > 0)"),
    "responses do not see the prompt": (packed_batch, "is_visible", "(key_response == 0) |", ""),
    "questions do not see the image": (packed_batch, "is_visible", "(key_question == 0) |", ""),
    "positions run on from response to response": (
        prefix_tree,
        "append_to_row",
        "(positions_AP.max() + 1",
        "(row.length",
    ),
    "a first token predicted by the token before it in the pack": (
        prefix_tree,
        "append_to_row",
        "[prompt_end, *",
        "[start - 1, *",
    ),
    "a wrong image taken for the same": (prefix_tree, "shared_prefix_length", "if not all(", "if False and not all("),
    "a mean over one process's questions": (
        trainer,
        "_forward_backward",
        "len(step.groups)).backward",
        "len(rank_groups)).backward",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_packing_or_accumulation_is_detected(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    context = make_context(families.NAMES[0])
    mutate(monkeypatch, [FAULTS[fault]])
    with pytest.raises(AssertionError):
        check_logits(context)
        check_accumulation(context, monkeypatch, (1, 8))


@pytest.mark.parametrize("masked", [False, True], ids=["all trained", "some masked"])
def test_the_batch_objective_equals_the_reference(context: trainer.TrainContext, masked: bool) -> None:
    """Compare loss and advantages with those computed from logits that are taken one response at a time."""
    everything = list(range(len(context.groups)))
    if masked:
        kept = [replace(group, is_trained=np.arange(len(group.scores)) % 3 > 0) for group in context.groups]
        context = replace(context, groups=kept)
    questions = [context.question(context.groups[g]) for g in everything]
    with torch.no_grad():
        logits = [
            torch.cat([alone(model, q, r) for q in questions for r in q.responses]).double().numpy()
            for model in (context.student, context.teacher, context.reference)
        ]
        outcome = trainer.batch_outcome(context, packed(context, everything), everything, {})
    batch = Batch(
        [[tuple(r) for r in q.responses] for q in questions],
        [group.scores.tolist() for group in context.groups],
        *logits,
    )
    is_trained_R = np.concatenate([group.is_trained for group in context.groups])
    expected = float64_reference.objective(batch, weight_R=is_trained_R)
    close(outcome.loss, expected.loss, "loss", atol=1e-4)
    divergence_sum = expected.question_sum(expected.divergence_R, batch)
    close(outcome.sums["divergence"], divergence_sum, "divergence", atol=1e-4)
    close(outcome.sums["kl_to_reference"], expected.question_sum(expected.kl_R, batch), "KL term", atol=1e-4)
    distill_sum = expected.question_sum(expected.distill_R, batch)
    close(outcome.sums["reward_distillation"], distill_sum, "distillation reward", atol=1e-3)


class GradientRecorder:
    """The student's hidden states [B, L, H] and token embeddings [B, L, H], with their gradients."""

    def __init__(self, student: Any) -> None:
        self.kept: dict[str, torch.Tensor] = {}
        self.hooks = [
            student.model.register_forward_hook(lambda _, __, out: self.keep("hidden", out.last_hidden_state)),
            student.get_input_embeddings().register_forward_hook(lambda _, __, out: self.keep("embedded", out)),
        ]

    def keep(self, name: str, value: torch.Tensor) -> None:
        value.retain_grad()
        self.kept[name] = value

    def has_gradient(self, name: str) -> torch.Tensor:
        """Return the positions [B, L] with a gradient other than 0."""
        grad = self.kept[name].grad
        assert grad is not None
        return grad.abs().sum(-1) != 0

    def __enter__(self) -> "GradientRecorder":
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def test_gradients_enter_at_the_predictors_and_never_at_prompt_or_padding(context: trainer.TrainContext) -> None:
    groups = [0, 2, 3]
    pack_ = packed(context, groups)
    ids_BL = pack_.inputs["input_ids"]
    predictor_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
    real_BL = torch.zeros_like(predictor_BL)
    for row, g in enumerate(
        [3, 0, 2]
    ):  # longest first; by hand: the prompt's last token and all but the last of each response
        prompt, at = 1 + tiny_models.IMAGE_TOKENS + 3 + g, 1 + tiny_models.IMAGE_TOKENS + 3 + g
        predictor_BL[row, prompt - 1] = True
        for n in LENGTHS[g]:
            predictor_BL[row, at : at + n - 1] = True
            at += n
        real_BL[row, :at] = True
    assert not real_BL.all()  # there is padding
    ref = references(context)
    with GradientRecorder(context.student) as watch:
        trainer.batch_outcome(context, pack_, groups, ref).loss.backward()
    context.student.zero_grad()
    assert torch.equal(watch.has_gradient("hidden"), predictor_BL)
    image_BL = ids_BL == context.student.config.image_token_id  # the image takes these embeddings' place
    last_BL = real_BL & ~predictor_BL & (torch.arange(ids_BL.shape[1]) >= predictor_BL.int().argmax(1)[:, None])
    assert torch.equal(watch.has_gradient("embedded"), real_BL & ~image_BL & ~last_BL)


def test_a_response_has_no_gradient_in_another(context: trainer.TrainContext) -> None:
    pack_ = packed(context, [0, 1])
    with GradientRecorder(context.student) as watch:
        logits_TV = response_logits(context.student, pack_)
        (logits_TV[pack_.response_T == 2] ** 2).sum().backward()  # question 0's last response, five tokens
    context.student.zero_grad()
    prompt = 1 + tiny_models.IMAGE_TOKENS + 3
    image_L = pack_.inputs["input_ids"][0] == context.student.config.image_token_id
    expected_L = torch.zeros_like(image_L)
    expected_L[:prompt] = ~image_L[:prompt]
    expected_L[prompt + 4 : prompt + 4 + 4] = True  # after responses of three and one; its own last predicts nothing
    moved_BL = watch.has_gradient("embedded")
    assert torch.equal(moved_BL[0], expected_L)
    assert not moved_BL[1].any()


def test_a_sampled_image_token_is_embedded_as_a_word(context: trainer.TrainContext) -> None:
    """A model may sample the image token, and the engine embeds it as a word: it equals a word with its embedding."""
    student, twin = copy.deepcopy(context.student), tiny_models.WORDS[1]
    image = student.config.image_token_id
    with torch.no_grad():
        student.get_input_embeddings().weight[twin] = student.get_input_embeddings().weight[image]
    found = []
    for token in (image, twin):
        student.zero_grad()
        questions = [tiny_models.question(student, n, 3 + n, [[30, token, 31], [token], [40, 41]]) for n in range(2)]
        one = pack(questions, student, context.family)
        assert one.token_T.tolist().count(token) == 4  # it stays what is to be predicted
        logits_TV = response_logits(student, one)
        (logits_TV[:, :10] ** 2).sum().backward()
        weight = student.get_input_embeddings().weight.grad
        found.append((logits_TV.detach(), weight[image] + weight[twin]))
    torch.testing.assert_close(found[0], found[1])


def test_no_gradient_reaches_teacher_or_reference(context: trainer.TrainContext) -> None:
    trainer.run_step(context, Step(0, 0, (0, 3)), references(context))
    context.student.zero_grad()
    for frozen in (context.teacher, context.reference):
        assert all(p.grad is None for p in frozen.parameters())


def test_identical_responses_get_equal_rewards_in_any_packing(context: trainer.TrainContext) -> None:
    same, other, third = tiny_models.random_responses(9, [3, 2, 4])
    longer = tiny_models.question(context.student, 7, 30, tiny_models.random_responses(10, [9, 9]))
    orders = [[same, other, same, third], [third, same, same, other], [other, third, same, same]]
    rewards, teacher = [], context.teacher
    for order in orders:
        for company in ([], [longer]):
            pack_ = pack(
                [tiny_models.question(context.student, 1, 5, order), *company], context.student, context.family
            )
            with torch.no_grad():
                states = response_states(context.student, pack_), response_states(teacher, pack_)
                divergence_R = objective.divergences(
                    pack_.expand(chunked_head.token_terms(*states, pack_.token_U, "jsd")), pack_
                )
            score_R = torch.tensor([float(r is not third) for r in order] + [1.0] * 2 * len(company))
            distill_R, advantage_R = objective.advantages(divergence_R, score_R, pack_, context.rewards)
            first, second = (j for j, r in enumerate(order) if r is same)
            assert distill_R[first] == distill_R[second]
            assert advantage_R[first] == advantage_R[second]
            rewards.append([advantage_R[j] for r in (same, other, third) for j in [order.index(r)]])
    torch.testing.assert_close(torch.tensor(rewards), torch.tensor(rewards[:1] * 6), atol=1e-3, rtol=1e-3)


def test_without_beta_the_reference_changes_nothing(context: trainer.TrainContext) -> None:
    step, found = Step(0, 0, tuple(range(8))), []
    for reference in (context.reference, None):
        sums = trainer.run_step(replace(context, train=paper_train(beta=0.0), reference=reference), step, {})
        kl = sums.pop("kl_to_reference", None), sums.pop("largest_token_kl", None)
        found.append((gradient(context.student), kl, sums))
        context.student.zero_grad()
    assert torch.equal(found[0][0], found[1][0]) and found[0][2] == found[1][2]
    assert None not in found[0][1] and found[1][1] == (None, None)  # what was not computed is not logged


def test_the_reference_pass_packs_a_question_once_for_all_mask_stages(context: trainer.TrainContext, tmp_path) -> None:
    """Full coverage: every question has one group per mask stage, and all of them hold the student's responses."""
    later = [
        replace(group, stage=1, responses=[*group.responses[:1], *tiny_models.random_responses(20 + n, [2, 3])])
        for n, group in enumerate(context.groups)
    ]
    both = replace(
        context, groups=[*later, *context.groups], storage=Storage(str(tmp_path)), checkpoints="kept", token_budget=60
    )
    found = trainer.reference_log_probs(both)
    for g, group in enumerate(both.groups):
        with torch.no_grad():
            one = pack([context.question(group)], context.student, context.family)
            expected = formulas.chosen_log_probs(response_logits(context.student, one), one.token_T)
        torch.testing.assert_close(found[g], expected, atol=2e-5, rtol=1e-4)
    again = trainer.reference_log_probs(replace(both, student=cast(Any, None)))
    assert all(torch.equal(again[g], found[g]) for g in found)  # stored, not computed
