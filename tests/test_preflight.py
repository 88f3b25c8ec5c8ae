"""Names that tell models apart in tables: folders are often called the same."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from masters.preflight import STUDENTS, LocalModel, distinct

MODELS = st.builds(
    LocalModel,
    name=st.sampled_from(["final", "last", *STUDENTS]),
    folder=st.just(Path("/models")),
    digest=st.sampled_from([letter * 64 for letter in "abc"]),
)


@given(st.lists(MODELS, max_size=6))
def test_a_name_belongs_to_one_model(models: list[LocalModel]) -> None:
    named = distinct(models)
    assert [model.digest for model in named] == [model.digest for model in models]
    assert len({model.name for model in named}) == len({(model.name, model.digest) for model in models})
    assert not any(model.name in STUDENTS for model in named)


@given(st.lists(MODELS, max_size=6))
def test_a_name_stays_where_nothing_else_has_it(models: list[LocalModel]) -> None:
    for before, after in zip(models, distinct(models), strict=True):
        shared = any(other.name == before.name and other.digest != before.digest for other in models)
        assert (after.name == before.name) == (not shared and before.name not in STUDENTS)
