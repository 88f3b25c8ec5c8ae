"""Shards: each question in one, limited in size, stable when questions are added."""

from hypothesis import given
from hypothesis import strategies as st

from masters.common.hashing import digest
from masters.data.question_shards import QuestionRef, plan_shards


def make_refs(numbers) -> list[QuestionRef]:
    return sorted(QuestionRef(digest(str(n).encode()), f"q{n}", 0, n) for n in set(numbers))


@given(st.sets(st.integers(0, 10_000), max_size=400))
def test_every_question_is_in_one_shard_within_the_limit(numbers: set[int]) -> None:
    whole = make_refs(numbers)
    shards = plan_shards(whole, limit=16)
    assert [ref for shard in shards for ref in shard.refs] == whole
    assert all(0 < len(shard.refs) <= 16 for shard in shards)


@given(st.sets(st.integers(0, 10_000), min_size=50, max_size=300), st.integers(10_001, 20_000))
def test_new_question_changes_only_its_shard(numbers: set[int], new: int) -> None:
    before, after = (plan_shards(make_refs(n), limit=16) for n in (numbers, numbers | {new}))
    kept = {tuple(map(tuple, s.questions)) for s in before} & {tuple(map(tuple, s.questions)) for s in after}
    assert len(kept) >= len(before) - 1


def test_questions_with_equal_digests_share_a_shard() -> None:
    same = [QuestionRef("ab" * 32, f"q{n:02}", 0, n) for n in range(20)]
    assert sum(len(s.refs) for s in plan_shards(same, limit=4)) == 20
