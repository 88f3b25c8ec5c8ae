"""Shards are collected into an artifact, in threads from a server and one by one from files, with the same result."""

from pathlib import Path

import pytest

from masters.common.errors import StoreError
from masters.common.hashing import digest
from masters.config.sampling import Sampling
from masters.data.question_shards import QuestionRef, Shard
from masters.models.generation import shards
from masters.models.generation.shards import GeneratingModel, ShardRequest
from masters.store import tables
from masters.store.artifacts import Identity
from masters.store.storage import Storage

IDENTITY = Identity("evaluate", 1, {}, {})


def make_requests() -> list[ShardRequest]:
    """Make requests for forty shards of one prediction each."""
    model, sampling = GeneratingModel("m", Path("m"), "d"), Sampling.greedy(8, "float32")
    refs = [QuestionRef(digest(str(n).encode()), f"q{n}", 0, n) for n in range(40)]
    return [ShardRequest(model, "predictions", "evaluation", sampling, shard=Shard("", (ref,))) for ref in refs]


def make_store(root: Path, max_threads: int) -> tuple[Storage, list[ShardRequest]]:
    """Make a store that holds the requested shards."""
    storage, requests = Storage(str(root)), make_requests()
    storage.max_threads = max_threads
    for request in requests:
        (ref,) = request.shard.refs
        row = dict(question_id=ref.question_id, model="m", text="red", finish_reason="stop")
        storage.create(request.file, tables.encode([row], tables.PREDICTED))
    return storage, requests


def test_threads_collect_what_one_thread_collects(tmp_path: Path) -> None:
    collected = []
    for max_threads in (1, 8):
        storage, requests = make_store(tmp_path / str(max_threads), max_threads)
        files = shards.collect_shards(storage, IDENTITY, requests)
        collected.append((list(files.items()), {name: storage.read(f"{IDENTITY.folder}/{name}") for name in files}))
    assert collected[0] == collected[1] and len(collected[0][0]) > 40
    assert all(digest(collected[1][1][name]) == expected for name, expected in collected[1][0])


@pytest.mark.parametrize("max_threads", [1, 8])
def test_only_a_damaged_shard_is_removed(tmp_path: Path, max_threads: int) -> None:
    storage, requests = make_store(tmp_path, max_threads)
    storage.write(requests[17].file, b"half")
    with pytest.raises(StoreError, match="found no Parquet file; it was removed"):
        shards.collect_shards(storage, IDENTITY, requests)
    assert [request for request in requests if not storage.exists(request.file)] == [requests[17]]
