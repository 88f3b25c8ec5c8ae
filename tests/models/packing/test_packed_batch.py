"""A batch's loss is the sum of its questions' losses; responses without a verdict have no advantage."""

from pathlib import Path

import pytest
import torch

from masters.models.families import family_of
from masters.models.losses import formulas
from masters.models.model_loading import load_model
from masters.models.packing.packed_batch import pack, response_logits
from masters.models.packing.prefix_tree import Question
from masters.models.training import objective
from tests.models import family_questions
from tests.models.paper import paper_rewards, paper_train

FOLDER = Path(__file__).parents[3] / "demo" / "models" / "student"


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return load_model(FOLDER, "float32")


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return family_questions.questions(FOLDER, [(64, 64)] * 2, [[3, 1, 5], [2, 2]], (270, 350))


def test_loss_of_a_batch_is_the_sum_over_its_questions(model: torch.nn.Module, questions: list[Question]) -> None:
    """One batch of two equals two batches of one: a question does not depend on what it is packed with."""
    train, rewards, family = paper_train(), paper_rewards(accuracy="rules"), family_of("qwen3_vl")
    scores = {"q0": [1.0, 0.0, 1.0], "q1": [0.0, 1.0]}

    def loss(packed_questions: list[Question]) -> torch.Tensor:
        packed = pack(packed_questions, model, family)
        student = response_logits(model, packed)
        torch.manual_seed(1)
        teacher = student.detach().roll(1, dims=1)
        reference = student.detach().roll(2, dims=1)
        score = torch.tensor([s for q in packed_questions for s in scores[q.question_id]])
        terms = formulas.token_terms(student, teacher, packed.token_T, "jsd", reference)
        return objective.masters_loss(terms, score, packed, train, rewards).loss

    together = loss(questions)
    apart = loss(questions[:1]) + loss(questions[1:])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


def test_responses_without_verdict_keep_their_divergence_and_have_no_advantage(questions, model) -> None:
    packed = pack(questions, model, family_of("qwen3_vl"))
    divergence = torch.tensor([0.1, 0.2, 0.3, 0.1, 0.4])
    score = torch.tensor([1.0, float("nan"), 0.0, float("nan"), float("nan")])
    distill, advantage = objective.advantages(divergence, score, packed, paper_rewards(accuracy="rules"))
    assert advantage[1] == advantage[3] == advantage[4] == 0
    assert advantage[0] > 0 > advantage[2]
    torch.testing.assert_close(distill, torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]))
