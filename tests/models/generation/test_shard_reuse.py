"""Nightly runs with new, changed and withdrawn questions: each question is answered once by each model."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from masters.common.hashing import digest
from masters.config import Runtime
from masters.config.sampling import Sampling
from masters.data import question_shards
from masters.data.question_shards import QuestionRef
from masters.models.generation import shards
from masters.models.generation.shards import GeneratingModel, ShardCache, ShardRequest
from masters.store import artifacts, tables
from masters.store.artifacts import Artifact, Identity
from masters.store.storage import Storage

MODEL, GREEDY = GeneratingModel("m", Path("m"), "d"), Sampling.greedy(8, "float32")
TEMPLATE = ShardRequest(MODEL, "predictions", "evaluation", GREEDY)


class NightlyRuns:
    """A store in which each request that engines would get is answered by this class and noted."""

    def __init__(self, folder: str, patch: pytest.MonkeyPatch) -> None:
        self.storage, self.template = Storage(folder), TEMPLATE
        self.previous: list[Artifact] = []
        self.answered: list[str] = []  # question ids, in the last night
        patch.setattr(shards.engines, "run", lambda *_: {})
        patch.setattr(shards, "_plan_work", lambda requests, *_: [self.answer(request) for request in requests])

    def answer(self, request: ShardRequest) -> None:
        self.answered += [ref.question_id for ref in request.shard.refs]
        rows = [
            dict(question_id=ref.question_id, model="m", text=ref.digest)
            for ref in request.shard.refs
            for _ in range(request.samples)
        ]
        self.storage.create(request.file, tables.encode(rows, tables.PREDICTED))

    def run_night(self, questions: dict[str, int]) -> Artifact:
        """Answer `questions`, which maps ids to versions."""
        refs = sorted(QuestionRef(_digest(i, version), i, 0, 0) for i, version in questions.items())
        requests = ShardCache(self.storage, self.previous).plan_requests(self.template, refs)
        self.answered = []
        data = Artifact(self.storage, "data", {})
        shards.run_generation(data, requests, Runtime(), Path("work"), lambda *_: None)
        identity = Identity("evaluate", 1, {}, {request.fingerprint: request.fingerprint for request in requests})
        files = shards.collect_shards(self.storage, identity, requests)
        artifact = artifacts.commit(self.storage, identity, files, {})
        self.previous = [artifact]
        return artifact


def _digest(question_id: str, version: int) -> str:
    return digest(f"{question_id}/{version}".encode())


def read_predictions(artifact: Artifact) -> Iterator[tuple[str, str]]:
    for row in artifact.rows("predictions"):
        yield row["question_id"], row["text"]


IDS = [f"q{n}" for n in range(12)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(IDS), st.integers(0, 2)), min_size=1, max_size=5))
def test_only_new_and_changed_questions_are_answered(nights: list[dict[str, int]]) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(question_shards, "LIMIT", 3)
        patch.setattr(question_shards.plan_shards, "__defaults__", (3,))
        runs, previous = NightlyRuns(folder, patch), {}
        for questions in nights:
            artifact = runs.run_night(questions)
            expected = {i: _digest(i, version) for i, version in questions.items()}
            assert sorted(read_predictions(artifact)) == sorted(expected.items())
            new = {i for i, version in questions.items() if previous.get(i) != version}
            assert set(runs.answered) <= new  # a question that comes back may find its old shard
            assert len(runs.answered) == len(set(runs.answered))
            assert {(r["question_id"], r["question_digest"]) for r in artifact.rows("plan")} == set(expected.items())
            previous = questions


def test_a_night_without_change_is_the_same_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = NightlyRuns(str(tmp_path), monkeypatch)
    first = runs.run_night(dict.fromkeys(IDS, 0))
    runs.run_night(dict.fromkeys(IDS[:5], 0))
    third = runs.run_night(dict.fromkeys(IDS[:5], 0))
    assert runs.answered == []
    assert third.folder == runs.run_night(dict.fromkeys(IDS[:5], 0)).folder != first.folder


def test_a_shard_that_is_gone_is_planned_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = NightlyRuns(str(tmp_path), monkeypatch)
    runs.run_night(dict.fromkeys(IDS, 0))
    for name in runs.storage.names("shards"):
        runs.storage.remove(name)
    runs.run_night(dict.fromkeys(IDS, 0))
    assert sorted(runs.answered) == sorted(IDS)


def test_with_other_settings_every_question_is_answered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = NightlyRuns(str(tmp_path), monkeypatch)
    runs.run_night(dict.fromkeys(IDS, 0))
    runs.template = replace(TEMPLATE, samples=2)
    runs.run_night(dict.fromkeys(IDS, 0))
    assert len(runs.answered) == len(IDS)


def test_shard_fingerprints_stay_what_they_were() -> None:
    """Recorded from version 3: another value would make every store answer all questions again."""
    ref = QuestionRef("00" * 32, "q0", 0, 0)
    request = replace(TEMPLATE, shard=question_shards.Shard("", (ref,)))
    assert (request.settings_fingerprint, request.fingerprint) == ("dec78b5f534eedbd", "66dc8ba312fb47f3")
