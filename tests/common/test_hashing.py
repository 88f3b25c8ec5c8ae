"""Fingerprints and digests depend on content alone, and stay the same between versions."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masters.common.hashing import canonical_json, fingerprint, folder_digest, to_unit_interval
from masters.store.artifacts import Identity

literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def test_golden_fingerprints() -> None:
    """A change here would invalidate every existing artifact; increment a stage's VERSION instead."""
    assert fingerprint({"a": [1, 2.5, None, True, "ü"]}) == "ad40eecbd710c7d1"
    identity = Identity("generate-2", 1, {"top_k": 50}, {"teacher": "abc"}, slug="Easy VQA!")
    assert identity.folder == "generate/easy-vqa-8efa3bad93c43b51"


@given(literals)
def test_the_order_of_keys_does_not_matter(value: object) -> None:
    assert canonical_json({"x": value, "y": 1}) == canonical_json({"y": 1, "x": value})
    assert fingerprint(value) == fingerprint(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1: 2}, {"a": {1, 2}}, b"bytes"])
def test_values_that_are_not_literals_are_refused(value: object) -> None:
    with pytest.raises(TypeError):
        canonical_json(value)


def test_everything_but_the_round_changes_an_identity() -> None:
    base = dict(stage="train", version=1, config={"a": 1}, inputs={"i": "x"})
    same = Identity(**base | {"stage": "train-2"})
    assert same.fingerprint == Identity(**base).fingerprint
    for change in ({"stage": "mask"}, {"version": 2}, {"config": {"a": 2}}, {"inputs": {"i": "y"}}):
        assert Identity(**base | change).fingerprint != same.fingerprint


def test_folder_digests_cover_content_and_names(tmp_path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w.safetensors").write_bytes(b"1")
    assert folder_digest(tmp_path / "a") == folder_digest(tmp_path / "b")
    (tmp_path / "b" / "w.safetensors").write_bytes(b"2")
    assert folder_digest(tmp_path / "a") != folder_digest(tmp_path / "b")


@given(st.text(string.hexdigits.lower(), min_size=13, max_size=64))
def test_digests_are_mapped_to_the_unit_interval(hexadecimal: str) -> None:
    assert 0 <= to_unit_interval(hexadecimal) < 1
