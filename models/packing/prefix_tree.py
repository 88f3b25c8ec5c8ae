"""Prefix trees: questions about one image share its tokens, responses to one question share its prompt.

Shapes: P prompt tokens, N tokens of a segment, L tokens of a row, A position axes of the family.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F

from masters.models.families.base import Family

Response = tuple[int, ...]  # token ids
Predictors = dict[Response, list[tuple[int, int]]]  # the (row, position) that predicts each token of a response


@dataclass(frozen=True)
class Question:
    """A question ready to be packed: the processor's output for its prompt and its responses' token ids."""

    question_id: str
    prompt: dict[str, torch.Tensor]  # input_ids [1, P], pixel_values, ...
    responses: Sequence[Sequence[int]]

    @property
    def ids_P(self) -> torch.Tensor:
        return self.prompt["input_ids"][0]

    @cached_property
    def distinct_responses(self) -> list[Response]:
        """The responses without repetition, in order of appearance."""
        return list(dict.fromkeys(map(tuple, self.responses)))

    @cached_property
    def response_tokens(self) -> int:
        """Number of tokens of the distinct responses."""
        return sum(map(len, self.distinct_responses))

    @property
    def tokens(self) -> int:
        """Number of tokens that the question takes when it shares no prefix with another."""
        return len(self.ids_P) + self.response_tokens


@dataclass(frozen=True)
class TokenCounts:
    """Token counts of forward passes.

    `separate`: one sequence per response; `packed_tokens`: with prompts and images shared; `padded`: with padding.
    """

    passes: int = 0
    separate: int = 0
    packed_tokens: int = 0
    padded: int = 0

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts(*map(sum, zip(astuple(self), astuple(other), strict=True)))


@dataclass
class PrefixTree:
    """Questions about one image, by their number in the batch. The first `trunk` tokens of their prompts are equal."""

    trunk: int
    questions: dict[int, Question]

    @property
    def first(self) -> int:
        return min(self.questions)

    @property
    def tokens(self) -> int:
        return self.trunk + sum(len(q.ids_P) - self.trunk + q.response_tokens for q in self.questions.values())


@dataclass
class Row:
    """A row under construction: segments of (token ids [N], branch [3, N], positions [A, N])."""

    number: int
    length: int = 0
    image_prompts: list[dict[str, torch.Tensor]] = field(default_factory=list)  # the first prompt about each image
    segments: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def add_segment(self, ids_N: torch.Tensor, question: int, response: int, positions_AN: torch.Tensor) -> int:
        """Append tokens that belong to the image added last. Returns the position of the first one."""
        branch_31 = torch.tensor([[len(self.image_prompts)], [question], [response]])
        self.segments.append((ids_N, branch_31.expand(-1, len(ids_N)), positions_AN))
        self.length += len(ids_N)
        return self.length - len(ids_N)

    def padded(self, length: int) -> tuple[torch.Tensor, ...]:
        """Return token ids [L], branches [3, L] and positions [A, L], padded with zeros."""
        joined = (torch.cat(parts, -1) for parts in zip(*self.segments, strict=True))
        return tuple(F.pad(part, (0, length - self.length)) for part in joined)


def build_trees(questions: list[Question], family: Family, image_token: int) -> list[PrefixTree]:
    """Group questions with equal images whose prompts are equal up to the image's last token."""
    trees: list[PrefixTree] = []
    for number, question in enumerate(questions):
        for tree in trees:
            trunk = shared_prefix_length(tree, question, family, image_token)
            if trunk:
                tree.trunk, tree.questions[number] = trunk, question
                break
        else:
            trees.append(PrefixTree(len(question.ids_P), {number: question}))
    return trees


def shared_prefix_length(tree: PrefixTree, question: Question, family: Family, image_token: int) -> int:
    """Return how many leading tokens a question shares with a tree's trunk; 0 if they do not hold the whole image."""
    other = tree.questions[tree.first]
    if not all(torch.equal(other.prompt[key], question.prompt[key]) for key in family.image_keys):
        return 0
    comparable = min(tree.trunk, len(question.ids_P))
    differs = torch.nonzero(other.ids_P[:comparable] != question.ids_P[:comparable])
    shared = int(differs[0]) if len(differs) else comparable
    image_end = 1 + int(torch.nonzero(question.ids_P == image_token)[-1])
    return shared if shared >= image_end else 0


def assign_rows(trees: list[PrefixTree], row_length: int) -> list[list[PrefixTree]]:
    """Distribute trees over rows by first-fit decreasing: the largest first, each into the first row with room.

    A row holds `row_length` tokens, or the largest tree if that is longer.
    """
    capacity = max(row_length, *(tree.tokens for tree in trees))
    rows: list[list[PrefixTree]] = []
    used: list[int] = []
    for tree in sorted(trees, key=lambda tree: -tree.tokens):
        size = tree.tokens
        number = next((n for n, tokens in enumerate(used) if tokens + size <= capacity), len(rows))
        if number == len(rows):
            rows.append([])
            used.append(0)
        rows[number].append(tree)
        used[number] += size
    return rows


def append_to_row(tree: PrefixTree, row: Row, model: torch.nn.Module, family: Family) -> dict[int, Predictors]:
    """Append a tree to a row: trunk, then each question's tail and distinct responses.

    Returns the predictors of each question's distinct responses, by question number.
    """
    row.image_prompts.append(tree.questions[tree.first].prompt)
    predictors: dict[int, Predictors] = {}
    for number, question in tree.questions.items():
        positions_AP = family.prompt_positions(model, question.prompt)
        if number == tree.first:
            trunk_start = row.add_segment(question.ids_P[: tree.trunk], 0, 0, positions_AP[:, : tree.trunk])
        tail = question.ids_P[tree.trunk :]
        tail_start = row.add_segment(tail, number + 1, 0, positions_AP[:, tree.trunk :])
        prompt_end = tail_start + len(tail) - 1 if len(tail) else trunk_start + tree.trunk - 1
        predictors[number] = {}
        for response, tokens in enumerate(question.distinct_responses, 1):
            offset = torch.arange(len(tokens))
            positions_AN = (positions_AP.max() + 1 + offset).expand(len(positions_AP), -1)
            start = row.add_segment(torch.tensor(tokens), number + 1, response, positions_AN)
            # the prompt's last position predicts every response's first token
            before = [prompt_end, *range(start, start + len(tokens) - 1)]
            predictors[number][tokens] = [(row.number, position) for position in before]
    return predictors
