"""What an earlier run asked, so that a night answers only new and changed questions.

Shards are fixed lists: planned afresh, one new question would change the shard that it falls into, and all of that
shard's questions would be answered again. So a night keeps an earlier run's shards, cuts out what was withdrawn, and
plans only the rest. Every artifact that engines answered has the table `plan`, which says what each shard holds.
"""

from collections.abc import Container, Iterable
from dataclasses import replace

from masters import shards
from masters.answering import PLAN, Order
from masters.artifacts import Artifact
from masters.identity import fingerprint
from masters.shards import Ref, Shard
from masters.storage import Storage

Plan = dict[str, dict[str, list[tuple[str, str]]]]  # who was asked, shard, ids and digests of its questions


class Earlier:
    """The shards of earlier artifacts that are still in the store."""

    def __init__(self, storage: Storage, artifacts: Iterable[Artifact] = ()) -> None:
        self._plan: Plan = {}
        found = list(artifacts)
        self.folders = [artifact.folder for artifact in found]
        there = set(storage.names("shards")) if found else set()
        for artifact in found:
            for row in artifact.rows(PLAN):
                if f"shards/{row['kind']}/{row['shard']}.parquet" in there:
                    held = self._plan.setdefault(row["asker"], {}).setdefault(row["shard"], [])
                    held.append((row["question_id"], row["question_digest"]))

    def orders(self, asked: Order, refs: list[Ref]) -> list[Order]:
        """Orders like `asked` for these questions: first from earlier shards, then planned afresh."""
        wanted = {(ref.question_id, ref.digest): ref for ref in refs}
        orders = []
        for name, held in self._plan.get(asked.asker, {}).items():
            # one artifact after another may name a shard: what is taken once is gone from `wanted`
            kept = tuple(sorted(wanted.pop(question) for question in dict.fromkeys(held) if question in wanted))
            if kept:
                orders.append(_of(asked, name, kept, whole=len(kept) == len(set(held))))
        fresh = [replace(asked, shard=shard) for shard in shards.plan(sorted(wanted.values()))]
        return sorted([*orders, *fresh], key=lambda order: order.shard.refs)


def narrowed(order: Order, wanted: Container[Ref]) -> Order | None:
    """The order without the questions that are not wanted; None if none is left.

    The others are answered exactly as the whole order has them answered: in the same batch.
    """
    kept = tuple(ref for ref in order.shard.refs if ref in wanted)
    if not kept or len(kept) == len(order.shard.refs):
        return order if kept else None
    whole, batch = (order.part_of, ()) if order.part_of else (order.fingerprint, order.shard.refs)
    shard = Shard(order.shard.prefix, kept)
    return replace(order, shard=shard, stored=fingerprint([whole, shard.questions]), part_of=whole, batch=batch)


def _of(asked: Order, name: str, kept: tuple[Ref, ...], whole: bool) -> Order:
    shard = Shard("", kept)
    if whole:
        return replace(asked, shard=shard, stored=name)
    return replace(asked, shard=shard, stored=fingerprint([name, shard.questions]), part_of=name)
