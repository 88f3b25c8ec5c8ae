"""Shared prompts: the responses of a question behind one copy of its prompt, questions of one image behind its tokens.

Shapes: B rows, L packed length, P prompt tokens, R responses of the batch, T their tokens, U the distinct ones among
them (identical responses of a question are read once).

A row is a row of trees: an image's tokens (the trunk), what each question says after it, each question's responses.
A token sees the earlier tokens of its own branch, root to tip; positions of a response go on from its prompt's. So
every response is computed as if it stood alone behind its prompt.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from masters.models.families.base import VLM, Family
from masters.models.losses.chunked_head import Projection
from masters.models.losses.formulas import Terms
from masters.models.packing import flex_attention
from masters.models.packing.prefix_tree import Predictors, Question, Row, Sizes, append_to_row, rows_of, trees_of


@dataclass(frozen=True)
class PackedBatch:
    """A batch of packed questions.

    `inputs` go to the model; `predictors_U2` are the (row, position) whose output predicts each distinct response
    token, `token_U` these tokens; `distinct_T` which of them each response token is; `response_T` which response
    (0..R-1) it is of; `question_R` which question a response is of, in the order in which they were given.
    `asked`: the responses of each question, and `same_R`: a number a response, equal where a question's are identical;
    both known without asking a device. `image_word_BL`: where a response itself wrote the image's token, which is a
    word like any other there; None where none did.
    """

    inputs: dict[str, Any]
    image_word_BL: torch.Tensor | None
    predictors_U2: torch.Tensor
    token_U: torch.Tensor
    distinct_T: torch.Tensor
    response_T: torch.Tensor
    question_R: torch.Tensor
    asked: list[list[int]]
    same_R: list[int]
    sizes: Sizes = Sizes()

    @property
    def responses(self) -> int:
        return len(self.question_R)

    @property
    def token_T(self) -> torch.Tensor:
        return self.token_U[self.distinct_T]

    def spread(self, terms: Terms) -> Terms:
        """Terms of distinct tokens, [U], as terms of all response tokens, [T]."""
        return terms.at(self.distinct_T)


def pack(questions: list[Question], model: VLM, family: Family, row: int = 0) -> PackedBatch:
    """Pack questions into rows as long as the largest tree, on the model's device.

    Where attention skips the mask's empty blocks, another tree in a row costs nothing: rows then hold up to `row`
    tokens, in whole blocks. The image's token within a response (a model may sample it) would be taken for a place of
    the image: the model gets token 0 there, and `response_states` its true embedding.
    """
    device, sparse = next(model.parameters()).device, _takes_blocks(model)
    rows = rows_of(trees_of(questions, family, model.config.image_token_id), row if sparse else 0)
    laid, predictors = [Row(number) for number in range(len(rows))], {}
    for into, trees in zip(laid, rows, strict=True):
        for tree in trees:
            predictors |= append_to_row(tree, into, model, family)
    longest = max(one.length for one in laid)
    length = flex_attention.whole(longest) if sparse else longest
    padded = [one.padded(length) for one in laid]
    ids_BL, place_3BL, positions_ABL = (torch.stack(parts, -2) for parts in zip(*padded, strict=True))
    image_word_BL = (ids_BL == model.config.image_token_id) & (place_3BL[2] > 0)
    image_words = image_word_BL.to(device) if image_word_BL.any() else None
    ids_BL = ids_BL.masked_fill(image_word_BL, 0)
    ids_BL, place_3BL, positions_ABL = (part.to(device) for part in (ids_BL, place_3BL, positions_ABL))
    prompts = [tree.questions[tree.first].prompt for trees in rows for tree in trees]  # one an image
    inputs = {
        "input_ids": ids_BL,
        "attention_mask": block_mask(place_3BL) if sparse else attention_mask(place_3BL),
        "position_ids": family.shaped(positions_ABL),
        **family.token_inputs(model, ids_BL),
        **{key: torch.cat([prompt[key] for prompt in prompts]).to(device) for key in family.image_keys},
    }
    targets, asked, same_R = _targets(questions, predictors)
    separate = sum(len(q.ids_P) + len(response) for q in questions for response in q.responses)
    sizes = Sizes(1, separate, sum(one.length for one in laid), len(laid) * length)
    before_U2, token_U, distinct_T, response_T, question_R = (part.to(device) for part in targets)
    return PackedBatch(
        inputs, image_words, before_U2, token_U, distinct_T, response_T, question_R, asked, same_R, sizes
    )


def visible(place_3BL: torch.Tensor, row: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Whether a token sees another: earlier in the row, of the same image, and on its branch.

    `place_3BL`: each token's image (0: padding), question (0: the trunk) and response (0: the prompt), numbered from
    1. Padding sees itself alone: no row of the softmax is empty, and blocks of padding are off the diagonal.
    """
    image, question, response = (level_BL[row, query] for level_BL in place_3BL)
    image_k, question_k, response_k = (level_BL[row, key] for level_BL in place_3BL)
    same_question, same_response = question_k == question, response_k == response
    return (key == query) | (
        (key < query)
        & (image_k > 0)
        & (image_k == image)
        & ((question_k == 0) | same_question)
        & ((response_k == 0) | (same_question & same_response))
    )


def attention_mask(place_3BL: torch.Tensor) -> torch.Tensor:
    """`visible` as a boolean mask [B, 1, L, L], for scaled dot-product attention."""
    _, rows, length = place_3BL.shape
    at = torch.arange(length, device=place_3BL.device)
    row = torch.arange(rows, device=place_3BL.device)[:, None, None]
    return visible(place_3BL, row, at[:, None], at[None, :])[:, None]


def block_mask(place_3BL: torch.Tensor) -> BlockMask:
    """`visible` for FlexAttention, which skips blocks in which no token sees another."""
    _, rows, length = place_3BL.shape

    def mask_mod(row: torch.Tensor, _: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return visible(place_3BL, row, query, key)

    return flex_attention.mask(mask_mod, rows, length, place_3BL.device)


def response_states(model: VLM, packed: PackedBatch) -> Projection:
    """What predicts each distinct response token: last hidden states [U, H] at those positions only, and the head."""
    with _image_words(model, packed.image_word_BL):
        hidden_BLH = model.model(**packed.inputs, use_cache=False).last_hidden_state
    hidden_UH = hidden_BLH[packed.predictors_U2[:, 0], packed.predictors_U2[:, 1]]
    return Projection(hidden_UH, model.lm_head.weight)


def response_logits(model: VLM, packed: PackedBatch) -> torch.Tensor:
    """Logits [T, V] that predict each response token."""
    return response_states(model, packed).logits()[packed.distinct_T]


def _targets(
    questions: list[Question], predictors: dict[int, Predictors]
) -> tuple[tuple[torch.Tensor, ...], list[list[int]], list[int]]:
    """What `Pack` says of response tokens, from predictors by question number."""
    before, distinct, tokens, responses, asked, same = [], [], [], [], [], []
    for number, question in enumerate(questions):
        begin = {}
        for response, at in predictors[number].items():
            begin[response] = len(tokens)
            before += at
            tokens += response
        asked.append(list(range(len(same), len(same) + len(question.responses))))
        for response in map(tuple, question.responses):
            distinct += range(begin[response], begin[response] + len(response))
            responses += [len(same)] * len(response)
            same.append(begin[response])
    of = [number for number, own in enumerate(asked) for _ in own]
    return tuple(torch.tensor(part) for part in (before, tokens, distinct, responses, of)), asked, same


def _takes_blocks(model: VLM) -> bool:
    return model.config.get_text_config()._attn_implementation == flex_attention.NAME


@contextmanager
def _image_words(model: VLM, image_word_BL: torch.Tensor | None) -> Iterator[None]:
    """Embed the image's token as a word where a response wrote it, as the engine that sampled it did."""

    if image_word_BL is None:
        yield
        return
    here_BL1 = image_word_BL[..., None]

    def embed(words: torch.nn.Embedding, _: object, embedded_BLH: torch.Tensor) -> torch.Tensor:
        return torch.where(here_BL1, words.weight[model.config.image_token_id], embedded_BLH)

    hook = model.get_input_embeddings().register_forward_hook(embed)
    try:
        yield
    finally:
        hook.remove()
