"""Sources: their rows, what their digests cover, and what they refuse."""

import gzip
import io
import json
import os
import subprocess
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from masters.common.errors import InputError
from masters.config import Data
from masters.data.row_validation import validate_rows
from masters.data.sources import RawRow, digits, open_source
from masters.data.sources.class_labels import read_label_names
from masters.data.sources.easyvqa import question_category
from tests.data import source_files
from tests.data.source_files import png

C_LOCALE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def records(count: int = 6) -> list[dict]:
    return source_files.records(count, split="train")


def write_jsonl(folder: Path, rows: list[dict] | None = None) -> Path:
    return source_files.write_jsonl(folder, records() if rows is None else rows)


def write_parquet(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def open_path(path: object, revision: str | None = None):
    return open_source(Data(source=str(path), revision=revision))


def refusal_message(path: object, revision: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        open_path(path, revision)
    line = str(caught.value)
    assert "\n" not in line
    return line


# paths


@pytest.mark.parametrize(
    "name", ["./no.jsonl", "/no/such", "no.parquet", "a/b/c", "~/nothing-here", "x.csv", "x" * 5000 + ".jsonl"]
)
def test_missing_path_is_not_looked_up_on_the_hub(name):
    line = refusal_message(name)
    assert line.startswith("source not found") and "correct data.source" in line


def test_unreachable_hub_fails_quickly_with_one_line():
    began = time.monotonic()
    line = refusal_message("masters-tests/no-such-data-set", "v1")
    assert time.monotonic() - began < 300
    assert "masters-tests/no-such-data-set at v1" in line and "check the name" in line


def test_other_files_and_folders_are_refused(tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    assert "expected a .jsonl or .parquet file, found .json with one JSON array" in refusal_message(
        tmp_path / "rows.json"
    )
    assert "found neither" in refusal_message(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "s3://bucket/rows.parquet",
            "found a URI (s3:), which is not supported; copy it to this machine and name",
        ),
        ("gs://bucket/folder", "found a URI (gs:)"),
        ("https://example.org/rows.parquet", "found a URI (https:)"),
        ("HTTP://example.org/rows", "found a URI (http:)"),
        ("file:///data/rows.jsonl", "found a URI (file:), which is not supported; write its path"),
        ("file:rows.jsonl", "found a URI (file:)"),
        ("hf://datasets/org/name/train.parquet", 'write data.source = "org/name"'),
        ("https://huggingface.co/datasets/org/name", 'write data.source = "org/name"'),
        ("parts/*.parquet", "found a pattern, which is not expanded; name the folder"),
        ("*.jsonl", "found a pattern"),
        ("part-[0-9]?", "found a pattern"),
    ],
)
def test_the_message_on_an_unsupported_source_names_the_supported_ones(name, expected):
    line = refusal_message(name)
    assert expected in line and "a JSONL or Parquet file, a folder of Parquet files" in line


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_the_command_for_a_json_array_works_from_any_folder(tmp_path, indent, suffix, encoding, monkeypatch):
    write_jsonl(tmp_path)
    monkeypatch.chdir(tmp_path)
    path = Path("my rows", "it's").with_suffix(suffix)
    path.parent.mkdir()
    rows = [row | {"image": "../images/0.png", "question": "größer?"} for row in records()]
    path.write_text("\n" + json.dumps(rows, indent=indent, ensure_ascii=False), encoding=encoding)
    line = refusal_message(path)
    assert f"found {suffix} with one JSON array; convert it to one object a line: " in line
    command = line.partition("a line: ")[2]
    done = subprocess.run(["bash", "-c", command], cwd="/", capture_output=True, text=True, env=os.environ | C_LOCALE)
    assert done.returncode == 0, done.stderr
    converted = list(open_path(tmp_path / "my rows" / "it's-lines.jsonl").rows())
    assert [(row.id, row.question) for row in converted] == [(row["id"], row["question"]) for row in rows]


def test_array_with_an_object_a_line_is_recognized(tmp_path):
    (tmp_path / "rows.jsonl").write_text("[" + ",\n".join(json.dumps(row) for row in records()) + "\n]\n")
    assert "with one JSON array" in refusal_message(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name", ["rows.json", "rows"])
def test_a_file_that_cannot_be_read_is_an_input_error(tmp_path, name):
    (tmp_path / name).symlink_to("/proc/self/mem")  # reading its first bytes is an error, for root too
    assert "found one that cannot be read (Input/output error)" in refusal_message(tmp_path / name)


@pytest.mark.timeout(20)
def test_a_pipe_is_not_waited_for(tmp_path):
    for name in ("rows.json", "rows.jsonl", "rows.parquet"):
        os.mkfifo(tmp_path / name)
        assert "such as a named pipe" in refusal_message(tmp_path / name)


def test_other_files_are_told_what_to_do(tmp_path):
    for name, content, expected in (
        (
            "rows.csv",
            "id,image\n",
            "found .csv; convert it to one of them, with the columns id, image, question, answer",
        ),
        ("rows.jsonl.gz", "", "found .gz; unpack it"),
        ("lines.json", '{"id": 1}\n{"id": 2}\n', "found .json; it has one JSON object a line: rename it to .jsonl"),
        ("object.json", '{\n "id": 1}', "found .json; convert it"),
        ("none", "text", "found no suffix; convert it"),
    ):
        (tmp_path / name).write_text(content)
        assert expected in refusal_message(tmp_path / name)
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder")
    assert "found neither; of JSONL name one file" in refusal_message(tmp_path / "folder")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (
            ["id", "images", "messages"],
            "image may be in images, question may be in messages, answer may be in messages",
        ),
        (["images", "prompt", "reward_model"], "question may be in prompt, answer may be in reward_model"),
        (["question_id", "image", "question", "label"], "(id may be in question_id, answer may be in label)"),
    ],
)
def test_other_formats_are_told_where_the_columns_may_be(tmp_path, columns, expected):
    line = refusal_message(write_parquet(tmp_path / "rows.parquet", [dict.fromkeys(columns, "x")]))
    assert expected in line and "; add or rename: " in line


def test_a_revision_of_a_local_source_is_refused(tmp_path):
    assert "remove data.revision" in refusal_message(write_jsonl(tmp_path), "main")
    assert "remove data.revision" in refusal_message("easyvqa", "main")


# JSONL


def test_jsonl_rows(tmp_path):
    rows = list(open_path(write_jsonl(tmp_path)).rows())
    assert len(rows) == 6
    assert rows[3] == RawRow("q3", "images/1.png", "what is 3?", "3", "train", None, tmp_path)


def test_broken_lines_become_faulty_rows_with_their_numbers(tmp_path):
    path = write_jsonl(tmp_path)
    good = path.read_bytes().splitlines()
    lines = [
        b"\xef\xbb\xbf" + good[0],
        b"",
        b"{not json",
        b"[1]",
        b'"text"',
        b'{"id": "\xff"}',
        b"[" * 100_000,
        good[1],
    ]
    path.write_bytes(b"\n".join(lines))
    rows = list(open_path(path).rows())
    assert [r.id for r in rows] == ["q0", "line 3", "line 4", "line 5", "line 6", "line 7", "q1"]
    faults = [r.fault for r in rows[1:-1]]
    assert [f.split(" (")[0] for f in faults] == [
        "line is not valid JSON", "line is not an object", "line is not an object", "line is not UTF-8",
        "line is not valid JSON",
    ]  # fmt: skip
    assert rows[0].fault is None and rows[-1].fault is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda content: content.decode().encode("utf-16"), "found text in UTF-16; save it as UTF-8"),
        (lambda content: b"\xfe\xff" + content.decode().encode("utf-16-be"), "found text in UTF-16; save it as UTF-8"),
        (gzip.compress, "found a gzip archive; unpack it"),
        (lambda content: b"PAR1" + content + b"PAR1", "found a Parquet file; rename it to .parquet"),
    ],
)
def test_a_jsonl_file_with_other_content_is_told_what_it_holds(tmp_path, change, expected):
    path = write_jsonl(tmp_path)
    path.write_bytes(change(path.read_bytes()))
    assert refusal_message(path).endswith(expected)


@pytest.mark.parametrize("content", [b"", b"\n \n\n"])
def test_an_empty_jsonl_is_refused(tmp_path, content):
    (tmp_path / "rows.jsonl").write_bytes(content)
    assert "is empty" in refusal_message(tmp_path / "rows.jsonl")


def test_jsonl_file_without_a_required_column_is_refused_but_a_row_is_read(tmp_path):
    rows = records()
    for row in rows:
        row["label"] = row.pop("answer")
    line = refusal_message(write_jsonl(tmp_path, rows))
    assert "found id, image, label, question, split" in line and line.endswith("add or rename: answer")
    rows = records()
    del rows[0]["answer"]
    assert next(open_path(write_jsonl(tmp_path, rows)).rows()).answer is None


# digests


def test_jsonl_digest_covers_rows_and_images(tmp_path):
    path = write_jsonl(tmp_path / "a")
    before = open_path(path).digest()
    assert open_path(write_jsonl(tmp_path / "b")).digest() == before, "the path is not content"
    os.utime(path)
    (path.parent / "images" / "unnamed.png").write_bytes(b"named by no row")
    assert open_path(path).digest() == before
    image = path.parent / "images" / "1.png"
    image.write_bytes(png(9))
    changed = open_path(path).digest()
    image.unlink()
    gone = open_path(path).digest()
    image.write_bytes(png(1))
    assert open_path(path).digest() == before
    path.write_text(path.read_text() + json.dumps(records(7)[6]) + "\n")
    assert len({before, changed, gone, open_path(path).digest()}) == 4


def test_a_digest_reads_nothing_outside_the_folder(tmp_path):
    secret = tmp_path / "secret.png"
    rows = [*records(), {**records()[0], "id": "x", "image": "../secret.png"}]
    path = write_jsonl(tmp_path / "data", rows)
    digests = set()
    for content in (b"one", b"two"):
        secret.write_bytes(content)
        digests.add(open_path(path).digest())
    assert len(digests) == 1


@pytest.mark.parametrize("name", ["bad\x00name.png", "x" * 5000, "\ud800.png", "images"])
def test_digest_tolerates_impossible_image_names(tmp_path, name):
    path = write_jsonl(tmp_path, [*records(), {**records()[0], "id": "x", "image": name}])
    assert len(open_path(path).digest()) == 64


def test_parquet_digest_changes_with_an_image_file(tmp_path):
    write_jsonl(tmp_path)
    path = write_parquet(tmp_path / "rows.parquet", records())
    before = open_path(path).digest()
    (tmp_path / "images" / "0.png").write_bytes(png(99))
    assert open_path(path).digest() != before


# Parquet


def test_parquet_folder_is_read_by_name_without_temporary_files(tmp_path):
    rows = [{**r, "image": png(0)} for r in records()]
    write_parquet(tmp_path / "b.parquet", rows[3:])
    write_parquet(tmp_path / "a" / "a.parquet", rows[:3])
    write_parquet(tmp_path / "_temporary" / "c.parquet", rows)
    source = open_path(tmp_path)
    assert [r.id for r in source.rows()] == [f"q{i}" for i in range(6)]
    before = source.digest()
    write_parquet(tmp_path / "c.parquet", rows)
    assert open_path(tmp_path).digest() != before


@pytest.mark.parametrize(
    "names",
    [
        ("data/test-00000-of-00001", "data/train-00000-of-00002", "data/train-00001-of-00002"),
        ("split=test/0", "split=train/0", "split=train/1"),
        ("Training_b", "Training_c", "dev"),
    ],
)
def test_parquet_files_named_like_splits_are_those_splits(tmp_path, names):
    for name in names:
        write_parquet(tmp_path / f"{name}.parquet", [{**r, "split": None} for r in records(1)])
    assert {r.split for r in open_path(tmp_path).rows()} == {None}, "a column decides alone"
    rows = [{name: value for name, value in r.items() if name != "split"} for r in records(1)]
    for name in names:
        write_parquet(tmp_path / f"{name}.parquet", rows)
    assert sorted(str(r.split) for r in open_path(tmp_path).rows()) == ["test", "train", "train"]


@pytest.mark.parametrize("names", [("train-0", "train-1"), ("train-0", "test-0", "more"), ("trainers", "testimony")])
def test_names_that_do_not_tell_both_splits_name_none(tmp_path, names):
    rows = [{name: value for name, value in r.items() if name != "split"} for r in records(1)]
    for name in names:
        write_parquet(tmp_path / f"{name}.parquet", rows)
    assert [r.split for r in open_path(tmp_path).rows()] == [None] * len(names)


def test_parquet_images_are_bytes_paths_or_structs(tmp_path):
    structs = [{**r, "image": {"bytes": png(1), "path": "ignored.png"}} for r in records(1)]
    named = [{**r, "image": {"bytes": None, "path": "images/0.png"}} for r in records(2)[1:]]
    rows = list(open_path(write_parquet(tmp_path / "rows.parquet", structs + named)).rows())
    assert [r.image for r in rows] == [png(1), "images/0.png"]
    assert rows[1].root == tmp_path


def test_a_list_of_one_image_is_that_image(tmp_path):
    lists = [{**r, "image": [{"bytes": png(1), "path": None}]} for r in records(1)]
    assert [r.image for r in open_path(write_parquet(tmp_path / "lists.parquet", lists)).rows()] == [png(1)]
    lines = [{**r, "image": [r["image"]]} for r in records(2)]
    assert [r.image for r in open_path(write_jsonl(tmp_path, lines)).rows()] == ["images/0.png"] * 2


def test_images_in_another_struct_are_told_from_missing_ones(tmp_path):
    rows = [{**r, "image": {"data": png(1), "format": "png"}} for r in records(1)]
    (rejected,) = validate_rows(open_path(write_parquet(tmp_path / "rows.parquet", rows)))
    assert (
        rejected.reason
        == "image is neither bytes nor a path (found dict with data, format; expected bytes or path in it)"
    )


def test_digest_covers_images_by_absolute_path_and_file_uri(tmp_path):
    for reference in (f"{tmp_path}/images/0.png", f"file://{tmp_path}/images/0.png", "images/../images/0.png"):
        path = write_jsonl(tmp_path, [{**records(1)[0], "image": reference}])
        before = open_path(path).digest()
        (tmp_path / "images" / "0.png").write_bytes(png(99))
        assert open_path(path).digest() != before


def test_parquet_refusals(tmp_path):
    (tmp_path / "text.parquet").write_text("not parquet")
    assert "expected a Parquet file" in refusal_message(tmp_path / "text.parquet")
    narrow = write_parquet(tmp_path / "narrow.parquet", [{"id": "1", "image": b"x"}])
    assert refusal_message(narrow).endswith("add or rename: question, answer")
    empty = tmp_path / "empty.parquet"
    pq.write_table(pa.Table.from_pylist(records()).slice(0, 0), empty)
    assert "is empty" in refusal_message(empty)


def test_a_damaged_parquet_body_is_an_input_error(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", [{**r, "image": bytes(2000)} for r in records()])
    data = bytearray(path.read_bytes())
    data[4:200] = b"\xff" * 196
    path.write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        list(open_path(path).rows())


# datasets


def make_dataset(folder: Path, count: int = 6) -> datasets.Dataset:
    features = {c: datasets.Value("string") for c in ("id", "question", "answer")} | {"image": datasets.Image()}
    rows = [
        {"id": r["id"], "question": r["question"], "answer": r["answer"], "image": {"bytes": png(i // 2), "path": None}}
        for i, r in enumerate(records(count))
    ]
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def test_saved_data_set_yields_stored_bytes_and_splits_by_part(tmp_path):
    whole = make_dataset(tmp_path)
    whole.save_to_disk(tmp_path / "one")
    parts = datasets.DatasetDict(train=whole.select(range(4)), validation=whole.select([4, 5]))
    parts.save_to_disk(tmp_path / "many")
    one, many = list(open_path(tmp_path / "one").rows()), list(open_path(tmp_path / "many").rows())
    assert [r.image for r in one] == [r.image for r in many] == [png(i // 2) for i in range(6)]
    assert [r.split for r in one] == [None] * 6
    assert [r.split for r in many] == ["train"] * 4 + ["test"] * 2


def test_a_list_of_one_image_in_a_saved_data_set_is_that_image_undecoded(tmp_path):
    whole = make_dataset(tmp_path)
    lists = [{**row, "image": [row["image"]]} for row in whole.cast_column("image", datasets.Image(decode=False))]
    features = datasets.Features({**whole.features, "image": datasets.List(datasets.Image())})
    datasets.Dataset.from_list(lists, features=features).save_to_disk(tmp_path / "lists")
    assert [r.image for r in open_path(tmp_path / "lists").rows()] == [png(i // 2) for i in range(6)]


@pytest.mark.parametrize("name", ["validation", "valid", "Dev", "eval", "test"])
def test_parts_of_a_saved_data_set_have_the_names_that_rows_have(tmp_path, name):
    whole = make_dataset(tmp_path)
    parts = datasets.DatasetDict({"Training": whole.select(range(4)), name: whole.select([4, 5])})
    parts.save_to_disk(tmp_path / "many")
    assert [r.split for r in open_path(tmp_path / "many").rows()] == ["train"] * 4 + ["test"] * 2


def test_class_labels_are_read_by_name(tmp_path):
    whole = make_dataset(tmp_path).cast_column("answer", datasets.ClassLabel(names=[f"class {i}" for i in range(6)]))
    whole = whole.add_column("split", [0, 1] * 3).cast_column("split", datasets.ClassLabel(names=["Train", "dev"]))
    whole.save_to_disk(tmp_path / "saved")
    whole.to_parquet(tmp_path / "rows.parquet")
    for path in (tmp_path / "saved", tmp_path / "rows.parquet"):
        rows = list(open_path(path).rows())
        assert [r.answer for r in rows] == [f"class {i}" for i in range(6)]
        assert [r.split for r in rows] == ["Train", "dev"] * 3


def label_rows(**columns) -> list[dict]:
    return [{"id": "a", "image": {"bytes": png(0), "path": None}, "question": "?"} | columns]


def open_as_saved_and_as_parquet(folder: Path, rows: list[dict], **features) -> list[RawRow]:
    """Return the first row of each kind of source, made of rows with images as structures, which have no type."""
    text = datasets.Value("string")
    image = {"bytes": datasets.Value("binary"), "path": text}
    whole = datasets.Dataset.from_list(
        rows, features=datasets.Features(dict(id=text, image=image, question=text) | features)
    )
    whole.save_to_disk(folder / "saved")
    whole.to_parquet(folder / "rows.parquet")
    return [next(open_path(path).rows()) for path in (folder / "saved", folder / "rows.parquet")]


def test_class_labels_are_read_beside_a_column_without_a_type(tmp_path):
    label = datasets.ClassLabel(names=["cat", "dog"])
    for row in open_as_saved_and_as_parquet(tmp_path, label_rows(answer=1), answer=label):
        assert row.answer == "dog"


def test_lists_of_class_labels_are_read_by_name(tmp_path):
    label = datasets.ClassLabel(names=["cat", "dog"])
    for number, feature in enumerate((datasets.Sequence(label), datasets.LargeList(label), [label])):
        for row in open_as_saved_and_as_parquet(tmp_path / str(number), label_rows(answer=[1, 0]), answer=feature):
            assert row.answer == ["dog", "cat"]


def test_a_class_label_of_minus_one_is_a_missing_value(tmp_path):
    label = datasets.ClassLabel(names=["cat", "dog"])
    for row in open_as_saved_and_as_parquet(tmp_path, label_rows(answer=-1, category=1), answer=label, category=label):
        assert (row.answer, row.category) == (None, "dog")


@pytest.mark.parametrize("feature", [None, "text", [], [None], {}, {"_type": "ClassLabel"}, {"_type": "List"}, 7])
def test_odd_metadata_of_a_column_costs_only_its_own_names(feature):
    features = {"category": feature, "answer": {"_type": "ClassLabel", "names": ["cat"]}}
    schema = pa.schema([], metadata={"huggingface": json.dumps({"info": {"features": features}})})
    assert read_label_names(schema) == {"answer": ["cat"]}


@pytest.mark.parametrize("metadata", [None, b"{", b"[]", b'{"info": {"features": []}}', b"\xff", b"[" * 100_000])
def test_metadata_of_another_kind_names_no_labels(metadata):
    assert read_label_names(pa.schema([], metadata=metadata and {"huggingface": metadata})) == {}


def test_digest_of_a_saved_data_set_covers_its_content(tmp_path):
    for name, count in (("a", 6), ("b", 5)):
        make_dataset(tmp_path, count).save_to_disk(tmp_path / name)
    before = open_path(tmp_path / "a").digest()
    assert open_path(tmp_path / "b").digest() != before
    (tmp_path / "a" / "cache-123.arrow").write_bytes(b"cache of map()")
    assert open_path(tmp_path / "a").digest() == before


def test_saved_data_set_refusals(tmp_path):
    make_dataset(tmp_path).rename_column("answer", "label").save_to_disk(tmp_path / "narrow")
    datasets.DatasetDict(holdout=make_dataset(tmp_path)).save_to_disk(tmp_path / "holdout")
    make_dataset(tmp_path).select([]).save_to_disk(tmp_path / "empty")  # `datasets` cannot load what it saved
    parts = datasets.DatasetDict(train=make_dataset(tmp_path), test=make_dataset(tmp_path).select([]))
    parts.save_to_disk(tmp_path / "part")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "dataset_info.json").write_text("{")
    assert refusal_message(tmp_path / "narrow").endswith("add or rename: answer")
    assert "found holdout; rename" in refusal_message(tmp_path / "holdout")
    assert "expected a folder with rows" in refusal_message(tmp_path / "empty")
    assert "expected a folder with rows" in refusal_message(tmp_path / "broken")
    assert "part/test has no rows, and datasets loads no such part" in refusal_message(tmp_path / "part")


class FakeHub:
    def __init__(self, commits: dict):
        self.commits = commits

    def dataset_info(self, name, revision=None, timeout=None):
        return type("Info", (), {"sha": self.commits[revision]})()


def test_a_hub_data_set_is_streamed_at_its_resolved_commit(tmp_path, monkeypatch):
    requests = []

    def load(name, revision, streaming, download_config):
        requests.append((name, revision, streaming))
        return datasets.IterableDatasetDict(train=make_dataset(tmp_path).to_iterable_dataset())

    monkeypatch.setattr("huggingface_hub.HfApi", lambda: FakeHub({None: "c1", "v1": "c1", "v2": "c2"}))
    monkeypatch.setattr("datasets.load_dataset", load)
    sources = [open_path("org/shapes", revision) for revision in (None, "v1", "v2")]
    assert requests == [("org/shapes", "c1", True), ("org/shapes", "c1", True), ("org/shapes", "c2", True)]
    digests = [s.digest() for s in sources]
    assert digests[0] == digests[1] != digests[2]
    rows = list(sources[0].rows())
    assert [(r.id, r.image, r.split) for r in rows] == [(f"q{i}", png(i // 2), "train") for i in range(6)]


# easy-VQA


def test_easyvqa_has_the_official_split():
    rows = list(open_path("easyvqa").rows())
    assert [sum(r.split == s for r in rows) for s in ("train", "test")] == [38575, 9673]
    assert rows[0].id == "train-0" and rows[-1].id == "test-9672"
    assert len({(r.root, r.image) for r in rows}) == 5000
    assert {r.category for r in rows} == {"color", "shape", "color-yes-no", "shape-yes-no"}
    answers = {
        c: {r.answer for r in rows if r.category == c} for c in ("color", "shape", "color-yes-no", "shape-yes-no")
    }
    assert answers["shape"] == {"circle", "rectangle", "triangle"}
    assert answers["color"] == {"red", "green", "blue", "yellow", "brown", "black", "gray", "teal"}
    assert answers["color-yes-no"] == answers["shape-yes-no"] == {"yes", "no"}


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("what is the blue shape?", "shape"), ("what color is the circle?", "color"),
        ("what is the color of the shape?", "color"), ("is no teal shape present?", "color-yes-no"),
        ("does the image not contain a triangle?", "shape-yes-no"),
    ],
)  # fmt: skip
def test_easyvqa_categories(question, expected):
    assert question_category(question) == expected


def test_digits_have_fixed_scenes():
    source = open_source(Data(source="digits"))
    rows = list(source.rows())
    assert [sum(row.split == split for row in rows) for split in ("train", "test")] == [12_000, 3_000]
    assert open_source(Data(source="digits")).digest() == source.digest()
    with Image.open(io.BytesIO(rows[0].image)) as picture:
        assert picture.size == (128, 32)
    assert len({row.image for row in rows}) == 7_500


def test_handwritten_digit_pools_are_disjoint():
    pools = [set(pool) for pool in digits.POOLS.values()]
    assert len(set.union(*pools)) == sum(map(len, pools)) == 5_000


def test_the_answer_in_steps_ends_with_the_short_answer():
    for question in digits.questions([4, 0, 7]):
        assert question.steps.split("= ")[-1] == question.answer
    assert [question.answer for question in digits.questions([4, 0, 7])] == ["11", "4 0 7", "7", "1", "11", "no"]
