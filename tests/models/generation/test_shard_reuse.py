"""Nights of new, changed and withdrawn questions: each is answered once, by whoever had not answered it yet."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from masters.common.hashing import digest
from masters.config import Runtime
from masters.data import question_shards
from masters.data.question_shards import Ref
from masters.models.generation import shards as answering
from masters.models.generation.shards import NO_SHARD, GeneratingModel, ShardCache, ShardRequest
from masters.store import artifacts, tables
from masters.store.artifacts import Artifact, Identity
from masters.store.storage import Storage

ASKED = ShardRequest(
    GeneratingModel("m", Path("m"), "d", {}), NO_SHARD, "predictions", "evaluation", None, 0, 1, {"dtype": "x"}
)


class Nights:
    """A store in which every order that engines would get is answered by hand and counted."""

    def __init__(self, folder: str, patch: pytest.MonkeyPatch) -> None:
        self.storage, self.asked, self.last, self.answered = Storage(folder), ASKED, [], []
        patch.setattr(answering.engines, "run", lambda *_: {})
        patch.setattr(answering, "_work", lambda orders, *_: [self.answer(order) for order in orders])

    def answer(self, order: ShardRequest) -> None:
        ids = [ref.question_id for ref in order.shard.refs]
        self.answered += ids
        rows = [
            dict(question_id=i, model="m", text=f"{r.digest}")
            for i, r in zip(ids, order.shard.refs, strict=True)
            for _ in range(order.samples)
        ]
        self.storage.create(order.file, tables.encode(rows, tables.PREDICTED))

    def night(self, questions: dict[str, int]) -> Artifact:
        """`questions`: id to version."""
        refs = sorted(Ref(digest(f"{i}/{version}".encode()), i, 0, 0) for i, version in questions.items())
        orders = ShardCache(self.storage, self.last).orders(self.asked, refs)
        self.answered = []
        data = Artifact(self.storage, "data", {})
        answering.run_generation(data, orders, Runtime(), Path("work"), lambda *_: None)
        made_of = Identity("evaluate", 1, {}, {order.fingerprint: order.fingerprint for order in orders})
        files = answering.collect_shards(self.storage, made_of, orders)
        artifact = artifacts.commit(self.storage, made_of, files, {})
        self.last = [artifact]
        return artifact


def told(artifact: Artifact) -> Iterator[tuple[str, str]]:
    for row in artifact.rows("predictions"):
        yield row["question_id"], row["text"]


IDS = [f"q{n}" for n in range(12)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(IDS), st.integers(0, 2)), min_size=1, max_size=5))
def test_only_what_is_new_or_changed_is_answered(nights: list[dict[str, int]]) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(question_shards, "LIMIT", 3)
        patch.setattr(question_shards.plan, "__defaults__", (3,))
        run, known = Nights(folder, patch), {}
        for questions in nights:
            artifact = run.night(questions)
            expected = {i: digest(f"{i}/{version}".encode()) for i, version in questions.items()}
            assert sorted(told(artifact)) == sorted(expected.items())
            fresh = {i for i, version in questions.items() if known.get(i) != version}
            assert set(run.answered) <= fresh  # a question that comes back may find its old shard
            assert len(run.answered) == len(set(run.answered))
            assert {(r["question_id"], r["question_digest"]) for r in artifact.rows("plan")} == set(expected.items())
            known = questions


def test_a_night_without_change_is_the_same_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Nights(str(tmp_path), monkeypatch)
    first = run.night(dict.fromkeys(IDS, 0))
    run.night(dict.fromkeys(IDS[:5], 0))
    third = run.night(dict.fromkeys(IDS[:5], 0))
    assert run.answered == []
    assert third.folder == run.night(dict.fromkeys(IDS[:5], 0)).folder != first.folder


def test_a_shard_that_is_gone_is_planned_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Nights(str(tmp_path), monkeypatch)
    run.night(dict.fromkeys(IDS, 0))
    for name in run.storage.names("shards"):
        run.storage.remove(name)
    run.night(dict.fromkeys(IDS, 0))
    assert sorted(run.answered) == sorted(IDS)


def test_other_sampling_answers_every_question_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Nights(str(tmp_path), monkeypatch)
    run.night(dict.fromkeys(IDS, 0))
    run.asked = replace(ASKED, samples=2)
    run.night(dict.fromkeys(IDS, 0))
    assert len(run.answered) == len(IDS)
