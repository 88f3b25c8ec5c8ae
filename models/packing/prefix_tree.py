"""What packed questions share: questions of one image its tokens, a question's responses their prompt.

Shapes: P prompt tokens, L tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F

from masters.models.families.base import Family

Predictors = dict[tuple[int, ...], list[tuple[int, int]]]  # of a response: the (row, position) before each token


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
    def distinct(self) -> list[tuple[int, ...]]:
        """Its responses without repetition, in order of appearance."""
        return list(dict.fromkeys(map(tuple, self.responses)))

    @cached_property
    def response_tokens(self) -> int:
        return sum(map(len, self.distinct))

    @property
    def tokens(self) -> int:
        """What it takes by itself."""
        return len(self.ids_P) + self.response_tokens


@dataclass(frozen=True)
class Sizes:
    """Token counts of forward passes.

    `separate`: one sequence a response; `packed_tokens`: with prompts and images shared; `padded`: with padding.
    """

    passes: int = 0
    separate: int = 0
    packed_tokens: int = 0
    padded: int = 0

    def __add__(self, other: "Sizes") -> "Sizes":
        return Sizes(*map(sum, zip(astuple(self), astuple(other), strict=True)))


@dataclass
class Tree:
    """Questions of one image, by their number in the batch; the first `trunk` tokens of their prompts are the same."""

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
    """A row that grows by segments of tokens, each with its place and positions."""

    number: int
    images: int = 0
    length: int = 0
    segments: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def add(self, ids: torch.Tensor, question: int, response: int, positions: torch.Tensor) -> int:
        """Append tokens of the image added last. Returns where they begin."""
        place_31 = torch.tensor([[self.images], [question], [response]])
        self.segments.append((ids, place_31.expand(-1, len(ids)), positions))
        self.length += len(ids)
        return self.length - len(ids)

    def padded(self, length: int) -> tuple[torch.Tensor, ...]:
        """Ids [L], places [3, L], positions [axes, L]."""
        whole = (torch.cat(parts, -1) for parts in zip(*self.segments, strict=True))
        return tuple(F.pad(part, (0, length - self.length)) for part in whole)


def trees_of(questions: list[Question], family: Family, image_token: int) -> list[Tree]:
    """Questions with equal images whose prompts share the tokens up to the image's last, together."""
    trees: list[Tree] = []
    for number, question in enumerate(questions):
        for tree in trees:
            trunk = _shared(tree, question, family, image_token)
            if trunk:
                tree.trunk, tree.questions[number] = trunk, question
                break
        else:
            trees.append(Tree(len(question.ids_P), {number: question}))
    return trees


def _shared(tree: Tree, question: Question, family: Family, image_token: int) -> int:
    """Leading tokens that the question has in common with the tree's trunk; 0 if these do not hold the whole image."""
    other = tree.questions[tree.first]
    if not all(torch.equal(other.prompt[key], question.prompt[key]) for key in family.image_keys):
        return 0
    n = min(tree.trunk, len(question.ids_P))
    differs = torch.nonzero(other.ids_P[:n] != question.ids_P[:n])
    trunk = int(differs[0]) if len(differs) else n
    image_end = 1 + int(torch.nonzero(question.ids_P == image_token)[-1])
    return trunk if trunk >= image_end else 0


def rows_of(trees: list[Tree], row: int) -> list[list[Tree]]:
    """Trees put into rows, the largest first, each into the first row that has room for it."""
    sized = sorted(((tree.tokens, tree) for tree in trees), key=lambda one: -one[0])
    length = max(row, sized[0][0])
    rows: list[tuple[int, list[Tree]]] = []
    for taken, tree in sized:
        for number, (used, own) in enumerate(rows):
            if used + taken <= length:
                own.append(tree)
                rows[number] = (used + taken, own)
                break
        else:
            rows.append((taken, [tree]))
    return [own for _, own in rows]


def append_to_row(tree: Tree, into: Row, model: torch.nn.Module, family: Family) -> dict[int, Predictors]:
    """Add a tree to a row. Returns, by question number, the predictors of its distinct responses."""
    into.images += 1
    found: dict[int, Predictors] = {}
    for number, question in tree.questions.items():
        positions = family.prompt_positions(model, question.prompt)
        if number == tree.first:
            trunk_at = into.add(question.ids_P[: tree.trunk], 0, 0, positions[:, : tree.trunk])
        tail = question.ids_P[tree.trunk :]
        tail_at = into.add(tail, number + 1, 0, positions[:, tree.trunk :])
        last = tail_at + len(tail) - 1 if len(tail) else trunk_at + tree.trunk - 1
        found[number] = {}
        for response, tokens in enumerate(question.distinct, 1):
            offset = torch.arange(len(tokens))
            after = (positions.max() + 1 + offset).expand(len(positions), -1)
            at = into.add(torch.tensor(tokens), number + 1, response, after)
            # the prompt's last position predicts every response's first token
            before = [last, *range(at, at + len(tokens) - 1)]
            found[number][tokens] = [(into.number, position) for position in before]
    return found
