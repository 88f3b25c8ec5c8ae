"""Which questions share a forward pass: planned from token counts alone, before any model is loaded.

Responses are generated ahead, so what a step holds and how long it is are known before the first one. A plan is a
function of steps, lengths, budget and ranks; nothing random, nothing of the models.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from masters.models.training.groups import Group, Step

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """The forward passes of all steps: how many, the tokens they take (before questions of one image share its own).

    `largest`: the groups of the pass of most tokens; `largest_tokens`: how many these are.
    """

    passes: int
    tokens: int
    largest: tuple[int, ...]
    largest_tokens: int


def size_of(group: Group) -> int | None:
    """Tokens that a question takes by itself: prompt and distinct responses. None where no table holds its prompt."""
    if group.prompt is None:
        return None
    return len(group.prompt) + sum(map(len, set(map(tuple, group.responses))))


def batches(items: Iterable[T], size: Callable[[T], int], tokens: int) -> Iterator[list[T]]:
    """Consecutive items that take at most `tokens` tokens together; one that takes more comes alone."""
    batch: list[T] = []
    room = tokens
    for item in items:
        taken = size(item)
        if batch and taken > room:
            yield batch
            batch, room = [], tokens
        batch.append(item)
        room -= taken
    if batch:
        yield batch


def split_across_ranks(groups: Sequence[int], sizes: Sequence[int | None], ranks: int) -> list[list[int]]:
    """A step's groups by rank, about as many tokens each: the longest first, to whoever has least. Order is kept.

    Where lengths are unknown they are dealt in turn.
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
    """All steps' passes, of at most `tokens` tokens each. None where lengths are unknown, or nothing is trained on."""
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes) or not steps:
        return None
    count, total, largest, most = 0, 0, (), 0
    for step in steps:
        for own in split_across_ranks(step.groups, sizes, ranks):
            for batch in batches(own, known.__getitem__, tokens):
                taken = sum(known[g] for g in batch)
                count, total = count + 1, total + taken
                if taken > most:
                    largest, most = tuple(batch), taken
    return Plan(count, total, largest, most)
