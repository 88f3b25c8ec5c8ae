"""`examples/straightforward.py` computes the same masks, rewards, advantages and losses as the trainer."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from demo import shapes
from examples import straightforward as plain
from masters.data.question_shards import QuestionRef
from masters.models import model_loading
from masters.models.families import family_of
from masters.models.losses import chunked_head
from masters.models.masking import group_thresholds, iterate_tensors
from masters.models.packing.packed_batch import pack, response_states
from masters.models.packing.prefix_tree import Question
from masters.models.prompts import model_inputs
from masters.models.training import objective, trainer
from masters.models.training.groups import Group, Step
from masters.store.storage import Storage
from tests.models.paper import paper_rewards, paper_train
from tests.shape_data import QUESTIONS

ROOT = Path(__file__).parents[2]
TEACHER, STUDENT = (ROOT / "demo/models" / name for name in ("teacher", "student"))
RATIO, STEPS, PER_STEP = 0.2, 4, 3
TRAIN = paper_train(learning_rate=1e-4, questions_per_step=PER_STEP)
# responses to a question: right and wrong, short and long, identical ones, and two that differ in punctuation only;
# the last one is cut off, without an end token
RESPONSE_TEXTS = (
    ("red", "red", "blue circle", "circle", "red."),
    ("yes", "no", "no"),
    ("circle", "circle"),
    ("gray", "a teal"),
)


@pytest.fixture(scope="module")
def groups_under_test(tmp_path_factory: pytest.TempPathFactory) -> list[plain.Group]:
    """Groups with fixed responses, in tokens, to questions about drawn images."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(3)
    tokenizer, groups = AutoProcessor.from_pretrained(STUDENT).tokenizer, []
    for number in range(STEPS * PER_STEP):
        image, shape, color = shapes.draw(rng)
        image.save(folder / f"{number}.png")
        question = plain.Question(folder / f"{number}.png", QUESTIONS[number % 3], "red")
        texts = RESPONSE_TEXTS[number % len(RESPONSE_TEXTS)]
        tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        responses = [
            ([*ids, tokenizer.eos_token_id], text, False) for ids, text in zip(tokens[:-1], texts, strict=False)
        ]
        groups.append(plain.make_group(question, [*responses, (tokens[-1], texts[-1], True), ([], "", False)]))
    return groups


@pytest.fixture(scope="module")
def thresholds() -> dict[str, float]:
    rows = group_thresholds(lambda: iterate_tensors(TEACHER), [RATIO], "matrix")
    return {row["tensor"]: row["threshold"] for row in rows}


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> str:
    return plain.masked_checkpoint(str(TEACHER), RATIO, tmp_path_factory.mktemp("masked"))


def script_steps(groups_under_test: list[plain.Group], masked: str) -> Iterator[plain.Outcome]:
    """Yield the script's steps, taken as in its `train`."""
    student, teacher, reference = (plain.load(folder) for folder in (str(STUDENT), masked, str(STUDENT)))
    processor = AutoProcessor.from_pretrained(STUDENT)
    optimizer = torch.optim.AdamW(student.parameters(), lr=TRAIN.learning_rate, weight_decay=0.0)
    for at in range(0, len(groups_under_test), PER_STEP):
        outcome = plain.step_outcome(
            student, teacher, reference, processor, groups_under_test[at : at + PER_STEP], TRAIN.beta
        )
        yield outcome
        optimizer.zero_grad()
        outcome.loss.backward()
        optimizer.step()


def trainer_steps(
    groups_under_test: list[plain.Group], thresholds: dict[str, float], context: trainer.TrainContext
) -> Iterator[plain.Outcome]:
    """Yield the trainer's steps on the same responses."""
    optimizer = torch.optim.AdamW(context.student.parameters(), lr=TRAIN.learning_rate, weight_decay=0.0)
    model_loading.remask(context.teacher, TEACHER, thresholds)
    for at in range(0, len(groups_under_test), PER_STEP):
        members = list(range(at, at + PER_STEP))
        packed = pack([context.question(context.groups[g]) for g in members], context.student, context.family)
        with torch.no_grad():
            taught = response_states(context.teacher, packed)
            terms = chunked_head.token_terms(response_states(context.student, packed), taught, packed.token_U, "jsd")
        score_R = torch.tensor([score for g in members for score in groups_under_test[g].scores])
        divergence_R = objective.divergences(packed.expand(terms), packed)
        distill_R, advantage_R = objective.advantages(divergence_R, score_R, packed, paper_rewards())
        sums = trainer.run_step(context, Step(0, 0, tuple(members)), {})
        yield plain.Outcome(torch.tensor(sums["loss"] / PER_STEP), score_R + distill_R, advantage_R)
        optimizer.step()
        optimizer.zero_grad()


def make_context(groups_under_test: list[plain.Group], store: Path) -> trainer.TrainContext:
    processor = AutoProcessor.from_pretrained(STUDENT)

    def question(group: Group) -> Question:
        one = groups_under_test[group.ref.row]
        buffer = io.BytesIO(one.question.image.read_bytes())
        prompt = model_inputs(processor, one.question.question, buffer.getvalue())
        return Question(str(group.ref.row), prompt, group.responses)

    groups = [
        Group(
            QuestionRef("", str(n), 0, n),
            0,
            None,
            g.responses,
            np.array(g.scores),
            ~np.array(g.is_truncated),
            [("teacher", RATIO, n) for n in range(len(g.scores))],
        )
        for n, g in enumerate(groups_under_test)
    ]
    return trainer.TrainContext(
        student=model_loading.load_model(STUDENT, "float32"),
        teacher=model_loading.load_model(TEACHER, "float32"),
        reference=model_loading.load_model(STUDENT, "float32"),
        remask=lambda stage: None,
        family=family_of("qwen3_vl"),
        train=TRAIN,
        rewards=paper_rewards(accuracy="rules"),
        ratios=[RATIO],
        groups=groups,
        steps=[],
        question=question,
        storage=Storage(str(store)),
        checkpoints="reference",
        checkpoint_steps=1,
        token_budget=16_384,
        report=lambda event: None,
    )


def test_masked_checkpoints_are_the_same(masked: str, thresholds: dict[str, float]) -> None:
    expected = dict(model_loading.iterate_masked_tensors(TEACHER, thresholds))
    found = dict(iterate_tensors(Path(masked)))
    assert found.keys() == expected.keys()
    assert {name for name in found if not torch.equal(found[name], expected[name])} == set()


def test_rewards_advantages_and_losses_are_the_same(groups_under_test, masked, thresholds, tmp_path) -> None:
    steps = list(
        zip(
            script_steps(groups_under_test, masked),
            trainer_steps(groups_under_test, thresholds, make_context(groups_under_test, tmp_path)),
            strict=True,
        )
    )
    assert len(steps) == STEPS
    for script, trained in steps:
        for name in ("reward_N", "advantage_N", "loss"):
            found, expected = getattr(script, name), getattr(trained, name)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, check_dtype=False)
    assert len({round(outcome.loss.item(), 3) for outcome, _ in steps}) == STEPS
    assert sum(outcome.advantage_N.count_nonzero().item() for outcome, _ in steps) > STEPS * PER_STEP
