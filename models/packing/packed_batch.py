"""Packed batches: the responses to a question share one copy of its prompt, questions about one image its tokens.

Shapes: B rows, L packed length, A position axes, H hidden size, V vocabulary, R responses of the batch, T their tokens,
U the distinct ones among these (identical responses to a question are read once).

A row holds prefix trees: an image's tokens (the trunk), each question's own prompt tokens, each question's responses.
A token sees the earlier tokens of its own branch, from root to tip; a response's positions continue its prompt's. So
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
from masters.models.packing.prefix_tree import (
    Predictors,
    Question,
    Response,
    Row,
    TokenCounts,
    append_to_row,
    assign_rows,
    build_trees,
)


@dataclass(frozen=True)
class PackedBatch:
    """A batch of packed questions.

    inputs: keyword arguments of the model.
    sampled_image_token_BL: True where a response itself holds the image token, which is an ordinary word there; None
        if no response does.
    predictor_U2: the (row, position) whose output predicts each distinct response token.
    token_U: the distinct response tokens.
    distinct_T: index into U of each response token.
    response_T: index into R of the response that each token belongs to.
    question_R: index of the question that each response belongs to, in the order in which questions were given.
    responses_by_question: indices into R of each question's responses. On the CPU.
    sequence_id_R: equal for identical responses to one question. On the CPU.
    """

    inputs: dict[str, Any]
    sampled_image_token_BL: torch.Tensor | None
    predictor_U2: torch.Tensor
    token_U: torch.Tensor
    distinct_T: torch.Tensor
    response_T: torch.Tensor
    question_R: torch.Tensor
    responses_by_question: list[list[int]]
    sequence_id_R: list[int]
    token_counts: TokenCounts = TokenCounts()

    @property
    def responses(self) -> int:
        return len(self.question_R)

    @property
    def token_T(self) -> torch.Tensor:
        return self.token_U[self.distinct_T]

    def expand(self, terms: Terms) -> Terms:
        """Expand terms of distinct tokens, [U], to terms of all response tokens, [T]."""
        return terms.select(self.distinct_T)


def pack(questions: list[Question], model: VLM, family: Family, row_length: int = 0) -> PackedBatch:
    """Pack questions into rows as long as the largest tree, on the model's device.

    Where attention skips empty blocks of the mask, more trees in a row cost nothing: rows then hold up to `row_length`
    tokens, in whole blocks.
    """
    device, skips_blocks = next(model.parameters()).device, _skips_empty_blocks(model)
    rows, predictors = _build_rows(questions, model, family, row_length if skips_blocks else 0)
    length = max(row.length for row in rows)
    if skips_blocks:
        length = flex_attention.round_up_to_block(length)
    inputs, sampled_image_token_BL = _model_inputs(rows, length, model, family)
    separate = sum(len(q.ids_P) + len(response) for q in questions for response in q.responses)
    return PackedBatch(
        inputs=inputs,
        sampled_image_token_BL=sampled_image_token_BL,
        token_counts=TokenCounts(1, separate, sum(row.length for row in rows), len(rows) * length),
        **_response_fields(questions, predictors, device),
    )


def _build_rows(
    questions: list[Question], model: VLM, family: Family, row_length: int
) -> tuple[list[Row], dict[int, Predictors]]:
    """Return the rows and, by question number, the predictors of the distinct responses."""
    trees = build_trees(questions, family, model.config.image_token_id)
    rows: list[Row] = []
    predictors: dict[int, Predictors] = {}
    for number, row_trees in enumerate(assign_rows(trees, row_length)):
        row = Row(number)
        for tree in row_trees:
            predictors |= append_to_row(tree, row, model, family)
        rows.append(row)
    return rows, predictors


def _model_inputs(
    rows: list[Row], length: int, model: VLM, family: Family
) -> tuple[dict[str, Any], torch.Tensor | None]:
    """Return the model's inputs for rows padded to `length`, and `PackedBatch.sampled_image_token_BL`."""
    device = next(model.parameters()).device
    parts = zip(*(row.padded(length) for row in rows), strict=True)
    ids_BL, branch_3BL, positions_ABL = (torch.stack(part, -2) for part in parts)
    # the model would put the image where a response sampled the image token: it gets token 0 there, and
    # `response_states` embeds the token as a word
    sampled_BL = (ids_BL == model.config.image_token_id) & (branch_3BL[2] > 0)
    sampled_image_token_BL = sampled_BL.to(device) if sampled_BL.any() else None  # checked on the CPU: no sync
    ids_BL = ids_BL.masked_fill(sampled_BL, 0)
    ids_BL, branch_3BL, positions_ABL = (part.to(device) for part in (ids_BL, branch_3BL, positions_ABL))
    prompts = [prompt for row in rows for prompt in row.image_prompts]
    inputs = {
        "input_ids": ids_BL,
        "attention_mask": block_mask(branch_3BL) if _skips_empty_blocks(model) else attention_mask(branch_3BL),
        "position_ids": family.model_positions(positions_ABL),
        **family.token_inputs(model, ids_BL),
        **{key: torch.cat([prompt[key] for prompt in prompts]).to(device) for key in family.image_keys},
    }
    return inputs, sampled_image_token_BL


def _response_fields(
    questions: list[Question], predictors: dict[int, Predictors], device: torch.device
) -> dict[str, Any]:
    """Return the fields of a `PackedBatch` that describe response tokens."""
    predictor_U2: list[tuple[int, int]] = []
    token_U: list[int] = []
    distinct_T: list[int] = []
    response_T: list[int] = []
    question_R: list[int] = []
    responses_by_question: list[list[int]] = []
    sequence_id_R: list[int] = []
    for number, question in enumerate(questions):
        start: dict[Response, int] = {}  # index into U of the first token of each distinct response
        for tokens, positions in predictors[number].items():
            start[tokens] = len(token_U)
            predictor_U2 += positions
            token_U += tokens
        first = len(question_R)
        for response, tokens in enumerate(map(tuple, question.responses), first):
            distinct_T += range(start[tokens], start[tokens] + len(tokens))
            response_T += [response] * len(tokens)
            question_R.append(number)
            sequence_id_R.append(start[tokens])
        responses_by_question.append(list(range(first, len(question_R))))
    tensors = dict(
        predictor_U2=predictor_U2, token_U=token_U, distinct_T=distinct_T, response_T=response_T, question_R=question_R
    )
    return {name: torch.tensor(values).to(device) for name, values in tensors.items()} | dict(
        responses_by_question=responses_by_question, sequence_id_R=sequence_id_R
    )


def is_visible(branch_3BL: torch.Tensor, row: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return whether the token at `query` sees the one at `key`: itself, or an earlier one of its branch and image.

    `branch_3BL`: the image (0: padding), question (0: the trunk) and response (0: the prompt) of each token, numbered
    from 1. Padding sees itself only: no row of the softmax is empty, and blocks of padding are off the diagonal.
    """
    image, question, response = (level_BL[row, query] for level_BL in branch_3BL)
    key_image, key_question, key_response = (level_BL[row, key] for level_BL in branch_3BL)
    same_question, same_response = key_question == question, key_response == response
    return (key == query) | (
        (key < query)
        & (key_image > 0)
        & (key_image == image)
        & ((key_question == 0) | same_question)
        & ((key_response == 0) | (same_question & same_response))
    )


def attention_mask(branch_3BL: torch.Tensor) -> torch.Tensor:
    """Return `is_visible` as a boolean mask [B, 1, L, L], for scaled dot-product attention."""
    _, rows, length = branch_3BL.shape
    position = torch.arange(length, device=branch_3BL.device)
    row = torch.arange(rows, device=branch_3BL.device)[:, None, None]
    return is_visible(branch_3BL, row, position[:, None], position[None, :])[:, None]


def block_mask(branch_3BL: torch.Tensor) -> BlockMask:
    """Return `is_visible` as a block mask for FlexAttention, which skips blocks in which no token sees another."""
    _, rows, length = branch_3BL.shape

    def mask_mod(row: torch.Tensor, _: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return is_visible(branch_3BL, row, query, key)

    return flex_attention.make_block_mask(mask_mod, rows, length, branch_3BL.device)


def response_states(model: VLM, packed: PackedBatch, vocabulary: int | None = None) -> Projection:
    """Return the last hidden states [U, H] that predict the distinct response tokens, with the head's weight.

    `vocabulary`: number of the tokenizer's ids, `prompts.vocabulary_size`; further rows of the head make no logits.
    """
    with _embed_sampled_image_tokens(model, packed.sampled_image_token_BL):
        hidden_BLH = model.model(**packed.inputs, use_cache=False).last_hidden_state
    hidden_UH = hidden_BLH[packed.predictor_U2[:, 0], packed.predictor_U2[:, 1]]
    return Projection(hidden_UH, model.lm_head.weight, vocabulary)


def response_logits(model: VLM, packed: PackedBatch, vocabulary: int | None = None) -> torch.Tensor:
    """Return the logits [T, V] that predict each response token. `vocabulary`: as of `response_states`."""
    return response_states(model, packed, vocabulary).logits()[packed.distinct_T]


def _skips_empty_blocks(model: VLM) -> bool:
    return model.config.get_text_config()._attn_implementation == flex_attention.NAME


@contextmanager
def _embed_sampled_image_tokens(model: VLM, sampled_image_token_BL: torch.Tensor | None) -> Iterator[None]:
    """Embed the image token as a word where a response sampled it, as the engine that sampled it did."""

    if sampled_image_token_BL is None:
        yield
        return
    sampled_BL1 = sampled_image_token_BL[..., None]

    def embed(embedding: torch.nn.Embedding, _: object, embedded_BLH: torch.Tensor) -> torch.Tensor:
        return torch.where(sampled_BL1, embedding.weight[model.config.image_token_id], embedded_BLH)

    hook = model.get_input_embeddings().register_forward_hook(embed)
    try:
        yield
    finally:
        hook.remove()
