"""Broken Parquet files and saved data sets: rows are rejected, or the whole source is refused with one line."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from masters.common.errors import InputError
from tests.bad_input.data_stage import build_data, outcomes
from tests.bad_input.image_files import encoded, plain

PICTURE = encoded(plain())


def columns(**changes: pa.Array) -> dict[str, pa.Array]:
    """Return the columns of three good rows in each split, with some columns replaced."""
    count = 6
    good = dict(
        id=pa.array([f"q{n}" for n in range(count)]),
        image=pa.array([PICTURE] * count, pa.binary()),
        question=pa.array(["what?"] * count),
        answer=pa.array(["that"] * count),
        split=pa.array(["train", "test"] * 3),
    )
    return good | {name: pa.concat_arrays([array, array]) for name, array in changes.items()}


def parquet_bytes(table: pa.Table, **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def parquet_with_names(names: list[str], arrays: list[pa.Array]) -> bytes:
    return parquet_bytes(pa.Table.from_arrays(arrays, names=names))


def not_utf8() -> pa.Array:
    """Return three texts, the first of which is not valid UTF-8."""
    return pa.Array.from_buffers(
        pa.string(), 3, [None, pa.array(["abc", "def", "ghi"]).buffers()[1], pa.py_buffer(b"a\xffcdefghi")]
    )


def old_dates() -> pa.Array:
    """Return three dates, the first of which Python cannot represent."""
    return pa.array([10**7, 1, 2], pa.int32()).cast(pa.date32())


# a replaced column, and the starts of the outcomes of its three rows
ROWS: dict[str, tuple[dict[str, pa.Array], list[str]]] = {
    "numbers as text": (dict(question=pa.array([1, 2, 3])), ["question is not text (found int)"] * 3),
    "numbers with NaN": (
        dict(answer=pa.array([1.0, float("nan"), None])),
        ["accepted", "answer is missing", "answer is missing"],
    ),
    "nulls": (dict(question=pa.array(["a", None, "b"])), ["accepted", "question is missing", "accepted"]),
    "nothing but nulls": (dict(answer=pa.nulls(3)), ["answer is missing"] * 3),
    "no utf-8": (dict(question=not_utf8()), ["question cannot be read", "accepted", "accepted"]),
    "dates as ids": (dict(id=old_dates()), ["id cannot be read", "id is not text (found date)", "id is not text"]),
    "whole numbers as ids": (dict(id=pa.array([7, -7, 2**62])), ["accepted"] * 3),
    "lists as images": (dict(image=pa.array([[1], [2], []])), ["image is a list"] * 3),
    "numbers as images": (dict(image=pa.array([1, 2, 3])), ["image is neither bytes nor a path"] * 3),
    "objects without bytes": (dict(image=pa.array([{"size": 1}] * 3)), ["image is neither bytes nor a path"] * 3),
    "objects with neither": (
        dict(image=pa.array([dict(bytes=None, path=None), dict(bytes=b"", path=None), dict(bytes=None, path="../x")])),
        ["image is missing", "image is empty", "image path leaves the data folder"],
    ),
    "paths that leave": (
        dict(image=pa.array(["/etc/passwd", "../x.png", "none.png"])),
        ["image path leaves the data folder", "image path leaves the data folder", "image file not found"],
    ),
    "lists as answers": (
        dict(answer=pa.array([["a", "b"], [], ["a", None]])),
        ["accepted", "answer is an empty list", "answer is missing"],
    ),
    "numbers as splits": (dict(split=pa.array([0, 1, 2])), ["unknown split"] * 3),
    "dictionaries of texts": (dict(question=pa.array(["a", "b", "a"]).dictionary_encode()), ["accepted"] * 3),
    "large texts": (dict(question=pa.array(["a", "b", "a"], pa.large_string())), ["accepted"] * 3),
}  # fmt: skip

# the content of a file, and a part of the error
WHOLE = parquet_bytes(pa.table(columns()), compression="none")
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "expected a Parquet file, found something else"),
    "truncated": (lambda: WHOLE[: len(WHOLE) // 2], "expected a Parquet file, found something else"),
    "without its end": (lambda: WHOLE[:-8], "expected a Parquet file, found something else"),
    "nothing but marks": (lambda: b"PAR1" * 5, "expected a Parquet file, found something else"),
    "text": (lambda: b"id,image,question,answer\n", "expected a Parquet file, found something else"),
    "overwritten inside": (lambda: WHOLE[:4] + b"\xff" * 400 + WHOLE[404:], "is damaged"),
    "without a column": (
        lambda: parquet_bytes(pa.table(columns()).drop_columns(["answer"])), "add or rename: answer",
    ),
    "another case": (
        lambda: parquet_bytes(pa.table(columns()).rename_columns(["ID", "Image", "Question", "Answer", "Split"])),
        "found Answer, ID, Image, Question, Split",
    ),
    "a column twice": (
        lambda: parquet_with_names([*columns(), "answer"], [*columns().values(), pa.array(["this"] * 6)]),
        "found several named answer",
    ),
    "without rows": (lambda: parquet_bytes(pa.table(columns()).slice(0, 0)), "is empty"),
    "without columns": (lambda: parquet_bytes(pa.table({"x": [1]})), "found x"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_faulty_parquet_row_is_rejected(tmp_path: Path, name: str) -> None:
    changes, expected = ROWS[name]
    (tmp_path / "data").mkdir()
    good = columns() | dict(id=pa.array([f"good{n}" for n in range(6)]))  # so that something can be built
    pq.write_table(pa.table(good), tmp_path / "data/b.parquet")
    pq.write_table(pa.table(columns(**changes)).slice(0, 3), tmp_path / "data/a.parquet")
    found = outcomes(build_data(tmp_path / "store", tmp_path / "data"))
    faulty = [outcome for key, outcome in found.items() if not key.startswith("good")]
    assert len(faulty) == 3
    for outcome, start in zip(sorted(faulty), sorted(expected), strict=True):
        assert outcome.startswith(start)


@pytest.mark.parametrize("name", FILES)
def test_a_faulty_parquet_file_is_refused(tmp_path: Path, name: str) -> None:
    make, message = FILES[name]
    (tmp_path / "rows.parquet").write_bytes(make())
    with pytest.raises(InputError) as caught:
        build_data(tmp_path / "store", tmp_path / "rows.parquet")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "store").rglob("record.json"))


SAVED: dict[str, tuple[object, str]] = {
    "a file outside": (dict(_data_files=[dict(filename="../../other.arrow")]), "names a file outside the folder"),
    "an absolute file": (dict(_data_files=[dict(filename="/etc/passwd")]), "names a file outside the folder"),
    "no list": (dict(), "lists no data files"),
    "a text for a list": (dict(_data_files="abc"), "lists no data files"),
    "no object": ([1], "lists no data files"),
}


@pytest.mark.parametrize("name", SAVED)
def test_faulty_saved_data_set_is_refused(tmp_path: Path, name: str) -> None:
    """The list of files in a saved data set may only name files in its folder."""
    state, message = SAVED[name]
    rows = dict(id=["a", "b"], image=[PICTURE] * 2, question=["q"] * 2, answer=["a"] * 2, split=["train", "test"])
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    assert build_data(tmp_path / "store", tmp_path / "saved").facts["rows"] == 2
    (tmp_path / "other.arrow").write_bytes((tmp_path / "saved/data-00000-of-00001.arrow").read_bytes())
    (tmp_path / "saved/state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=message):
        build_data(tmp_path / "store", tmp_path / "saved")
