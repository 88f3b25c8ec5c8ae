"""Shared prompts: the G responses of a question behind one copy of its prompt and image.

Shapes: B rows (questions), L packed length, P prompt tokens, T response tokens of the batch, R responses of it.
A response's token sees the prompt and the earlier tokens of its own response; positions go on from the prompt's,
so every response is computed as if it stood alone behind the prompt.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from masters.models.families.base import Family
from masters.models.head import Projection


@dataclass(frozen=True)
class Question:
    """A question ready to be packed: the processor's output for its prompt and its responses' token ids."""

    question_id: str
    prompt: dict[str, torch.Tensor]  # input_ids [1, P], pixel_values, ...
    responses: list[list[int]]


@dataclass(frozen=True)
class Pack:
    """A batch of packed questions.

    `inputs` go to the model; `predictors_T2` are the (row, position) whose output predicts each response token;
    `token_T` the tokens; `response_T` which response (0..R-1) a token is of; `question_R` which row a response is of.
    `image_word_BL`: where a response itself wrote the image's token, which is a word like any other there.
    """

    inputs: dict[str, torch.Tensor]
    image_word_BL: torch.Tensor
    predictors_T2: torch.Tensor
    token_T: torch.Tensor
    response_T: torch.Tensor
    question_R: torch.Tensor

    @property
    def responses(self) -> int:
        return len(self.question_R)

    def tokens_of(self, response: int) -> tuple[int, ...]:
        return tuple(self.token_T[self.response_T == response].tolist())


def pack(questions: list[Question], model: torch.nn.Module, family: Family) -> Pack:
    """Pack each question into a row of its own, padded to the longest.

    The image's token within a response (a model may sample it) would be taken for a place of the image: the model
    gets token 0 there, and `response_states` its true embedding.
    """
    rows = [_row(q) for q in questions]
    length = max(len(ids) for ids, _, _ in rows)
    ids_BL = torch.stack([F.pad(ids, (0, length - len(ids))) for ids, _, _ in rows])
    segment_BL = torch.stack([F.pad(segment, (0, length - len(segment)), value=-1) for _, segment, _ in rows])
    image_word_BL = (ids_BL == model.config.image_token_id) & (segment_BL > 0)
    ids_BL = ids_BL.masked_fill(image_word_BL, 0)
    positions = [
        _positions(q, offset, length, model, family) for q, (_, _, offset) in zip(questions, rows, strict=True)
    ]
    inputs = {
        "input_ids": ids_BL,
        "attention_mask": attention_mask(segment_BL),
        "position_ids": family.shaped(torch.stack(positions, 1)),
        **family.token_inputs(model, ids_BL),
        **{key: torch.cat([q.prompt[key] for q in questions]) for key in family.image_keys},
    }
    return Pack(inputs, image_word_BL, *_targets(questions))


def attention_mask(segment_BL: torch.Tensor) -> torch.Tensor:
    """Boolean mask [B, 1, L, L]: causal, and a token sees the prompt (segment 0) and its own segment only.

    Padding (segment -1) sees itself, so that no row of the softmax is empty.
    """
    i = torch.arange(segment_BL.shape[1])
    causal = i[:, None] >= i[None, :]
    query, key = segment_BL[:, :, None], segment_BL[:, None, :]
    return (causal & ((key == 0) | (key == query)))[:, None]


def _row(question: Question) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, segments (0 prompt, 1..G responses) and offsets within a response, each [L] of one question."""
    prompt = question.prompt["input_ids"][0]
    lengths = torch.tensor([len(r) for r in question.responses])
    segment = torch.cat(
        [
            torch.zeros(len(prompt), dtype=torch.long),
            torch.repeat_interleave(torch.arange(1, len(lengths) + 1), lengths),
        ]
    )
    ids = torch.cat([prompt, torch.tensor([t for r in question.responses for t in r], dtype=torch.long)])
    offset = torch.cat([torch.arange(n) for n in lengths.tolist()])
    return ids, segment, offset


def _positions(
    question: Question, offset: torch.Tensor, length: int, model: torch.nn.Module, family: Family
) -> torch.Tensor:
    """Positions [axes, length] of a packed row; a response starts after the prompt's largest position."""
    start = family.prompt_positions(model, question.prompt)
    after = (start.max() + 1 + offset).expand(start.shape[0], -1)
    whole = torch.cat([start, after], 1)
    return F.pad(whole, (0, length - whole.shape[1]))


def _targets(questions: list[Question]) -> tuple[torch.Tensor, ...]:
    predictors, tokens, responses, rows = [], [], [], []
    for row, question in enumerate(questions):
        prompt = question.prompt["input_ids"].shape[1]
        at = prompt
        for response in question.responses:
            # the prompt's last position predicts every response's first token
            predictors += [(row, prompt - 1), *((row, at + t) for t in range(len(response) - 1))]
            tokens += response
            responses += [len(rows)] * len(response)
            rows.append(row)
            at += len(response)
    return torch.tensor(predictors), torch.tensor(tokens), torch.tensor(responses), torch.tensor(rows)


def response_states(model: torch.nn.Module, packed: Pack) -> Projection:
    """What predicts each response token: last hidden states [T, H] at those positions only, and the head."""
    with _image_words(model, packed.image_word_BL):
        hidden_BLH = model.model(**packed.inputs, use_cache=False).last_hidden_state
    hidden_TH = hidden_BLH[packed.predictors_T2[:, 0], packed.predictors_T2[:, 1]]
    return Projection(hidden_TH, model.lm_head.weight)


def response_logits(model: torch.nn.Module, packed: Pack) -> torch.Tensor:
    """Logits [T, V] that predict each response token."""
    return response_states(model, packed).logits()


@contextmanager
def _image_words(model: torch.nn.Module, image_word_BL: torch.Tensor) -> Iterator[None]:
    """Embed the image's token as a word where a response wrote it, as the engine that sampled it did."""

    def embed(words: torch.nn.Module, _: object, embedded_BLH: torch.Tensor) -> torch.Tensor:
        return torch.where(image_word_BL[..., None], words.weight[model.config.image_token_id], embedded_BLH)

    if not image_word_BL.any():
        yield
        return
    hook = model.get_input_embeddings().register_forward_hook(embed)
    try:
        yield
    finally:
        hook.remove()
