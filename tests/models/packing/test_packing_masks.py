"""Every response token of any packed batch is predicted from only its own prompt and response."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from demo import families
from masters.models.families import family_of
from masters.models.packing.packed_batch import attention_mask, block_mask, pack
from masters.models.packing.prefix_tree import Question
from masters.models.training import load_balancing
from tests.models import tiny_models

MODELS = {name: tiny_models.model(name, seed=0) for name in families.NAMES}
tokens = st.lists(
    st.integers(tiny_models.WORDS[0], tiny_models.WORDS[0] + 3), min_size=1, max_size=4
)  # few: some are the same


@st.composite
def packed_questions(draw: st.DrawFn) -> tuple[torch.nn.Module, list[Question]]:
    """Draw questions about few images, some with equal text, with some identical responses."""
    model, made = MODELS[draw(st.sampled_from(families.NAMES))], []
    for _ in range(draw(st.integers(1, 6))):
        number, words, image = draw(st.integers(0, 2)), draw(st.integers(1, 3)), draw(st.integers(0, 2))
        made.append(tiny_models.question(model, number, words, draw(st.lists(tokens, min_size=1, max_size=4)), image))
    return model, made


@settings(max_examples=60, deadline=None)
@given(packed_questions())
def test_a_token_is_predicted_from_its_prompt_and_earlier_response_tokens(drawn) -> None:
    model, questions = drawn
    family = family_of(model.config.model_type)
    packed = pack(questions, model, family)
    mask_B1LL, ids_BL = packed.inputs["attention_mask"], packed.inputs["input_ids"]
    positions = packed.inputs["position_ids"].reshape(-1, *ids_BL.shape)
    at = 0
    for question in questions:
        prompt, known = question.ids_P.tolist(), family.prompt_positions(model, question.prompt)
        for response in question.responses:
            for n, token in enumerate(response):
                row, position = packed.predictor_U2[packed.distinct_T[at]].tolist()
                seen = mask_B1LL[row, 0, position]
                assert ids_BL[row, seen].tolist() == prompt + response[:n]
                after = known.max() + 1 + torch.arange(n).expand(len(known), -1)
                assert torch.equal(positions[:, row, seen], torch.cat([known, after], 1))
                assert packed.token_T[at] == token
                at += 1
    assert at == len(packed.token_T)


@settings(max_examples=20, deadline=None)
@given(packed_questions())
def test_nothing_is_packed_twice(drawn) -> None:
    """There is one copy of each image and of each distinct response."""
    model, questions = drawn
    packed = pack(questions, model, family_of(model.config.model_type))
    images = {q.prompt["pixel_values"].numpy().tobytes() for q in questions}
    assert len(packed.inputs["pixel_values"]) == len(images) * len(questions[0].prompt["pixel_values"])
    assert len(packed.token_U) == sum(len(r) for q in questions for r in {tuple(r) for r in q.responses})
    ids_BL = packed.inputs["input_ids"]
    assert (ids_BL == model.config.image_token_id).sum() == len(images) * tiny_models.IMAGE_TOKENS


def test_block_mask_equals_dense_mask() -> None:
    branch_3BL = torch.randint(0, 3, (3, 2, 256), generator=torch.Generator().manual_seed(0))
    blocks, dense = block_mask(branch_3BL), attention_mask(branch_3BL)
    every = torch.arange(256)
    for row in range(2):
        said = blocks.mask_mod(torch.tensor(row), torch.tensor(0), every[:, None], every[None, :])
        assert torch.equal(said, dense[row, 0])
    branch_3BL[0, 0, :128], branch_3BL[0, 0, 128:] = 1, 2  # two images: the second half does not see the first
    assert block_mask(branch_3BL).to_dense()[0, 0].tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("budget", [1, 30, 60, 1000])
def test_batches_keep_the_order_and_the_budget(budget: int) -> None:
    model = MODELS[families.NAMES[0]]
    questions = [tiny_models.question(model, n, 3 + n, tiny_models.random_responses(n, [n + 1, 2])) for n in range(9)]
    sizes = {q.question_id: len(q.ids_P) + q.response_tokens for q in questions}
    found = list(load_balancing.batches([q.question_id for q in questions], sizes.__getitem__, budget))
    assert [name for batch in found for name in batch] == [q.question_id for q in questions]
    totals = [sum(sizes[name] for name in batch) for batch in found]
    assert all(total <= budget or len(batch) == 1 for total, batch in zip(totals, found, strict=True))
    assert all(a + sizes[b[0]] > budget for a, b in zip(totals, found[1:], strict=False))  # no batch too soon
