"""An artifact's shards are put together several at a time from a server, and one after the other from files: alike."""

from pathlib import Path

import pytest

from masters.common.errors import StoreError
from masters.common.hashing import digest
from masters.data.question_shards import Ref, Shard
from masters.models.generation import shards
from masters.models.generation.shards import GeneratingModel, ShardRequest
from masters.store import tables
from masters.store.artifacts import Identity
from masters.store.storage import AT_ONCE, Storage

MADE_OF = Identity("evaluate", 1, {}, {})


def stored(root: Path, at_once: int) -> tuple[Storage, list[ShardRequest]]:
    """A store with forty shards of one answer each, and their orders."""
    storage, asker = Storage(str(root)), GeneratingModel("m", Path("m"), "d", {})
    storage.at_once = at_once
    refs = [Ref(digest(str(n).encode()), f"q{n}", 0, n) for n in range(40)]
    orders = [
        ShardRequest(asker, Shard("", (ref,)), "predictions", "evaluation", None, 0, 1, dict(dtype="float32"))
        for ref in refs
    ]
    for ref, order in zip(refs, orders, strict=True):
        row = dict(question_id=ref.question_id, model="m", text="red", finish_reason="stop")
        storage.create(order.file, tables.encode([row], tables.PREDICTED))
    return storage, orders


def test_several_at_a_time_make_what_one_after_the_other_makes(tmp_path: Path) -> None:
    found = []
    for at_once in (1, AT_ONCE):
        storage, orders = stored(tmp_path / str(at_once), at_once)
        files = shards.collect_shards(storage, MADE_OF, orders)
        found.append((list(files.items()), {name: storage.read(f"{MADE_OF.folder}/{name}") for name in files}))
    assert found[0] == found[1] and len(found[0][0]) > 40
    assert all(digest(found[1][1][name]) == said for name, said in found[1][0])


@pytest.mark.parametrize("at_once", [1, AT_ONCE])
def test_a_damaged_shard_alone_is_removed(tmp_path: Path, at_once: int) -> None:
    storage, orders = stored(tmp_path, at_once)
    storage.write(orders[17].file, b"half")
    with pytest.raises(StoreError, match="found no Parquet file; it was removed"):
        shards.collect_shards(storage, MADE_OF, orders)
    assert [order for order in orders if not storage.exists(order.file)] == [orders[17]]
