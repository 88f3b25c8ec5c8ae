"""Division of a step's questions into forward passes and over ranks, from token counts alone.

Responses are generated ahead of training, so all passes can be planned before a model is loaded. A plan depends on
steps, lengths, token budget and number of ranks only. Imports no torch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from masters.models.training.groups import Group, Step

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """The forward passes of all steps. Tokens are counted as if questions about one image shared none."""

    passes: int
    tokens: int
    largest: tuple[int, ...]  # groups of the pass with most tokens
    largest_tokens: int


def size_of(group: Group) -> int | None:
    """Return the tokens of a question alone: its prompt and distinct responses. None if no table holds its prompt."""
    if group.prompt is None:
        return None
    return len(group.prompt) + sum(map(len, set(map(tuple, group.responses))))


def batches(items: Iterable[T], size: Callable[[T], int], tokens: int) -> Iterator[list[T]]:
    """Yield batches of consecutive items with at most `tokens` tokens together; an item with more comes alone."""
    batch: list[T] = []
    room = tokens
    for item in items:
        item_tokens = size(item)
        if batch and item_tokens > room:
            yield batch
            batch, room = [], tokens
        batch.append(item)
        room -= item_tokens
    if batch:
        yield batch


def split_across_ranks(groups: Sequence[int], sizes: Sequence[int | None], ranks: int) -> list[list[int]]:
    """Divide a step's groups over ranks, with about equal tokens each; every rank keeps their order.

    The longest group comes first and goes to the rank with the fewest tokens. If a length is unknown, ranks take turns.
    """
    known = {g: size for g in groups if (size := sizes[g]) is not None}
    if ranks == 1 or len(known) < len(groups):
        return [list(groups[rank::ranks]) for rank in range(ranks)]
    load, rank_of = [0] * ranks, {}
    for g in sorted(groups, key=lambda g: -known[g]):
        rank_of[g] = min(range(ranks), key=load.__getitem__)
        load[rank_of[g]] += known[g]
    return [[g for g in groups if rank_of[g] == rank] for rank in range(ranks)]


def plan(steps: Sequence[Step], sizes: Sequence[int | None], tokens: int, ranks: int) -> Plan | None:
    """Plan passes of at most `tokens` tokens for all steps. Returns None without steps or if a length is unknown."""
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes) or not steps:
        return None
    passes, total, largest, largest_tokens = 0, 0, (), 0
    for step in steps:
        for rank_groups in split_across_ranks(step.groups, sizes, ranks):
            for batch in batches(rank_groups, known.__getitem__, tokens):
                pass_tokens = sum(known[g] for g in batch)
                passes, total = passes + 1, total + pass_tokens
                if pass_tokens > largest_tokens:
                    largest, largest_tokens = tuple(batch), pass_tokens
    return Plan(passes, total, largest, largest_tokens)
