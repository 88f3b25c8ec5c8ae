"""Groups held as columns equal those that are read row by row."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from masters.common.errors import MastersError
from masters.common.hashing import digest
from masters.data.question_shards import QuestionRef
from masters.models.training.groups import Group, ResponseGroups, response_groups
from masters.store import artifacts
from masters.store import tables as schemas
from masters.store.artifacts import Artifact, Identity
from masters.store.storage import Storage
from tests.models import plain_response_groups

RATIOS = [0.2, 0.1, 0.0]
QUESTIONS = [f"q{number}" for number in range(6)]
REFS = sorted(QuestionRef(digest(name.encode()), name, 0, number) for number, name in enumerate(QUESTIONS))
MODEL = dict(model="m", seed=0, text="")
JUDGED = dict(status="ok", judge="j", explanation="")
SOURCES = st.sampled_from([("teacher", ratio) for ratio in (*RATIOS, 0.7)] + [("student", None)])
KEYS = st.tuples(st.sampled_from(QUESTIONS), SOURCES, st.integers(0, 3))
ENDS = st.sampled_from(["stop", "length"])
RESPONSES = st.tuples(st.lists(st.integers(0, 2**31 - 1), max_size=4), ENDS)
SCORES = st.none() | st.floats(0, 1)


def table(storage: Storage, kind: str, rows: list[dict], files: int) -> Artifact:
    """Make an artifact with these rows, distributed over files, some of them empty."""
    schema, made_of, digests = getattr(schemas, kind.upper()), Identity(kind, 1, {}, {}), {}
    for number in range(files):
        content = schemas.encode(rows[number::files], schema)
        storage.write(f"{made_of.folder}/{kind}/{number}.parquet", content)
        digests[f"{kind}/{number}.parquet"] = digest(content)
    return artifacts.commit(storage, made_of, digests, {})


def check_equal(one: Group, other: Group) -> None:
    assert (one.ref, one.stage, one.responses, one.keys) == (other.ref, other.stage, other.responses, other.keys)
    assert one.prompt is not None and other.prompt is not None and one.prompt.tolist() == other.prompt.tolist()
    np.testing.assert_array_equal(one.scores, other.scores)
    assert one.is_trained.dtype == bool and one.is_trained.tolist() == other.is_trained.tolist()
    assert [type(part) for part in one.keys[0]] == [type(part) for part in other.keys[0]]


@given(
    responses=st.dictionaries(KEYS, RESPONSES),
    scores=st.dictionaries(KEYS, SCORES),
    trained=st.integers(0, len(REFS)),
    coverage=st.sampled_from(["partition", "full"]),
    files=st.integers(1, 3),
    judged=st.booleans(),
    truncated=st.sampled_from(["mask", "drop", "keep"]),
)
def test_groups_equal_those_that_are_read_row_by_row(
    responses: dict, scores: dict, trained: int, coverage: str, files: int, judged: bool, truncated: Any
) -> None:
    def columns(key: tuple) -> dict:
        question_id, (source, mask_ratio), sample = key
        return dict(question_id=question_id, source=source, mask_ratio=mask_ratio, sample=sample)

    def prompt(name: str) -> list[int]:
        return list(range(1, 2 + QUESTIONS.index(name)))

    rows = [
        columns(key) | MODEL | dict(prompt_token_ids=prompt(key[0]), response_token_ids=tokens, finish_reason=end)
        for key, (tokens, end) in responses.items()
    ]
    verdicts = [columns(key) | JUDGED | dict(score=score) for key, score in scores.items()]
    with TemporaryDirectory() as folder:
        storage = Storage(folder)
        tables = table(storage, "responses", rows, files), table(storage, "verdicts", verdicts, files)
        arguments = (REFS[:trained], tables[0], tables[1] if judged else None, RATIOS, coverage)
        expected, without = plain_response_groups.response_groups(*arguments, truncated)
        found, empty = response_groups(*arguments, truncated=truncated)
    assert (len(found), empty) == (len(expected), without)
    for one, other in zip(found, expected, strict=True):
        check_equal(one, other)


def groups_of(folder: Path) -> ResponseGroups:
    storage = Storage(str(folder))
    keys = [dict(question_id=q, source="student", mask_ratio=None, sample=0) for q in QUESTIONS]
    stopped = MODEL | dict(finish_reason="stop")
    rows = [one | stopped | dict(prompt_token_ids=[1], response_token_ids=[n]) for n, one in enumerate(keys)]
    return response_groups(REFS, table(storage, "responses", rows, 1), None, RATIOS, "partition")[0]


def test_response_groups_are_a_sequence(tmp_path: Path) -> None:
    groups = groups_of(tmp_path)
    assert [group.ref for group in groups] == REFS
    assert [group.ref for group in groups[1:3]] == REFS[1:3] and groups[-1].ref == REFS[-1]
    with pytest.raises(IndexError):
        groups[len(REFS)]


def test_different_prompts_of_teacher_and_student_are_refused(tmp_path: Path) -> None:
    """Two chat templates would teach the student answers to another prompt."""
    keys = [dict(question_id=q, source="student", mask_ratio=None, sample=n) for q in QUESTIONS for n in (0, 1)]
    stopped = MODEL | dict(finish_reason="stop")
    rows = [one | stopped | dict(prompt_token_ids=[1, 2, 3], response_token_ids=[4]) for one in keys]
    rows[-1]["prompt_token_ids"] = [1, 3, 2]
    tables = table(Storage(str(tmp_path)), "responses", rows, files=2)  # each has every question once
    with pytest.raises(MastersError, match="question q5: its responses follow different prompts"):
        response_groups(REFS, tables, None, RATIOS, "partition")
