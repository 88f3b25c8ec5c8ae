"""The data stage: its tables, identity and limits for every source, and memory that stays flat."""

import gc
import io
import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from masters.checks.preflight import Resources
from masters.common.errors import InputError
from masters.common.hashing import digest
from masters.config import Config
from masters.data import question_selection, question_table
from masters.data.sources import RawRow, open_source
from masters.models.generation.shards import ShardCache
from masters.store import artifacts, tables
from masters.store.artifacts import Artifact
from masters.store.storage import Storage
from masters.tasks import data as stage
from masters.tasks.run_context import Context
from tests.data import source_files
from tests.data.source_files import png, write_jsonl


def records(count: int = 200) -> list[dict]:
    """Return rows without a split: about a tenth of them is for testing."""
    return source_files.records(count, category="c")


def make_config(source: object, **data) -> Config:
    tree = {"name": "test", "store": {"root": "unused"}, "data": {"source": str(source)} | data}
    return Config.model_validate(tree | {"student": {"model": "s"}, "teachers": [{"model": "t"}]})


def build(store: Path, source: object, **data) -> Artifact:
    """Build the stage without Prefect."""
    return build_night(store, source, None, **data)


def build_night(store: Path, source: object, known: Artifact | None, **data) -> Artifact:
    """Build the stage without the training questions of the artifact `known`."""
    config, storage = make_config(source, **data), Storage(str(store))
    resources = open_resources(config, storage)
    identity = stage.make_identity(Context(config, resources, known_data=known))
    questions = stage.training_questions(known)
    written = question_table.write_tables(config, resources.source, storage, identity.folder, known=questions)
    return artifacts.commit(storage, identity, *written, {"known": known} if known else {})


def open_resources(config: Config, storage: Any = None) -> Resources:
    """Return the resources that the stage needs."""
    nothing: Any = None
    return Resources(storage, open_source(config.data), nothing, [], ())


def question_rows(artifact: Artifact) -> list[dict]:
    return list(artifact.rows("questions"))


def question_ids(artifact: Artifact, split: str) -> set[str]:
    return {r["question_id"] for r in question_rows(artifact) if r["split"] == split}


def fingerprint(source: object, **data) -> str:
    config = make_config(source, **data)
    return stage.make_identity(Context(config, open_resources(config), ShardCache(None))).fingerprint  # pyright: ignore


# the same content, whatever the source


def with_bytes(rows: list[dict]) -> list[dict]:
    return [{**r, "image": png(i // 2)} for i, r in enumerate(rows)]


def as_bytes(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(with_bytes(records())), folder / "bytes.parquet")
    return folder / "bytes.parquet"


def as_structs(folder: Path) -> Path:
    rows = [{**r, "image": {"bytes": r["image"], "path": None}} for r in with_bytes(records())]
    pq.write_table(pa.Table.from_pylist(rows), folder / "structs.parquet")
    return folder / "structs.parquet"


def as_paths(folder: Path) -> Path:
    write_jsonl(folder, records())
    pq.write_table(pa.Table.from_pylist(records()), folder / "paths.parquet")
    return folder / "paths.parquet"


def as_folder(folder: Path) -> Path:
    (folder / "parts").mkdir()
    rows = with_bytes(records())
    for part, at in enumerate(range(0, len(rows), 70)):
        pq.write_table(pa.Table.from_pylist(rows[at : at + 70]), folder / "parts" / f"{part}.parquet", row_group_size=9)
    return folder / "parts"


def as_saved(folder: Path) -> Path:
    text = datasets.Value("string")
    features = datasets.Features(id=text, image=datasets.Image(), question=text, answer=text, category=text)
    rows = [{**r, "image": {"bytes": r["image"], "path": None}} for r in with_bytes(records())]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("other", [as_bytes, as_structs, as_paths, as_folder, as_saved])
def test_every_source_gives_the_same_table(tmp_path, other):
    reference = build(tmp_path / "a", write_jsonl(tmp_path / "jsonl", records()))
    artifact = build(tmp_path / "b", other(tmp_path))
    assert question_rows(artifact) == question_rows(reference)
    assert artifact.record["files"] == reference.record["files"], "byte for byte"


def test_the_tables_and_the_facts(tmp_path):
    rows = records()
    rows[3]["answer"], rows[8]["answer"], rows[9]["image"] = None, "", "../x.png"
    artifact = build(tmp_path / "store", write_jsonl(tmp_path, rows))
    found = question_rows(artifact)
    assert tables.decode(artifact.storage.read(artifact.files("questions")[0])).schema.equals(tables.QUESTIONS)
    assert {r["question_id"] for r in found} == {r["id"] for r in rows} - {"q3", "q8", "q9"}
    assert all(r["image"] == png(int(r["question_id"][1:]) // 2) for r in found)
    assert list(artifact.rows("rejected")) == [
        {"id": "q3", "reason": "answer is missing"},
        {"id": "q8", "reason": "answer is empty"},
        {"id": "q9", "reason": "image path leaves the data folder ('../x.png')"},
    ]
    train, test = len(question_ids(artifact, "train")), len(question_ids(artifact, "test"))
    reasons = {"answer is missing": 1, "answer is empty": 1, "image path leaves the data folder": 1}
    assert artifact.facts == {
        "rows": 197,
        "rejected": 3,
        "read": 200,
        "train": train,
        "eval": test,
        "reasons": reasons,
        "known": 0,
        "leaked": 0,
        "remarks": {},
    }
    for listed in artifact.record["files"]:
        assert digest(artifact.storage.read(f"{artifact.folder}/{listed['name']}")) == listed["digest"]


def test_rejected_table_exists_without_rejections(tmp_path):
    artifact = build(tmp_path / "store", write_jsonl(tmp_path, records()))
    assert len(artifact.files("rejected")) == 1 and not list(artifact.rows("rejected"))


# identity


def test_identity_depends_on_content_and_limits(tmp_path):
    path = write_jsonl(tmp_path, records())
    base = fingerprint(path)
    for setting in (dict(max_rejected_share=0.5), dict(max_leaked_share=0.1), dict(fetch_images=True)):
        assert fingerprint(path, **setting) == base, "shapes no row"
    assert fingerprint(write_jsonl(tmp_path / "elsewhere", records())) == base
    limited = {fingerprint(path, train_limit=5), fingerprint(path, eval_limit=5)}
    (tmp_path / "images" / "0.png").write_bytes(png(999))
    assert len({base, *limited, fingerprint(path)}) == 4


# limits


def test_limits_take_the_smallest_selection_keys_and_keep_them_as_data_grows(tmp_path):
    small = write_jsonl(tmp_path / "small", records(300))
    large = write_jsonl(tmp_path / "large", list(reversed(records(400))))
    for i in range(200):  # reversed rows, the same images
        (large.parent / "images" / f"{i}.png").write_bytes(png(i))
    limits = {"train_limit": 40, "eval_limit": 10}
    everything, few, more = (
        build(tmp_path / "a", large),
        build(tmp_path / "b", small, **limits),
        build(tmp_path / "c", large, **limits),
    )
    for split, limit in (("train", 40), ("test", 10)):
        ranked = sorted(
            (question_selection.selection_key(r), r["question_id"])
            for r in question_rows(everything)
            if r["split"] == split
        )
        assert question_ids(more, split) == {question_id for _, question_id in ranked[:limit]}
        kept = question_ids(more, split) & {r["id"] for r in records(300)}
        assert kept <= question_ids(few, split), "a row chosen among more rows is chosen among fewer"
    assert few.facts["train"] == 40 and few.facts["eval"] == 10 and few.facts["rows"] == 50
    assert few.facts["read"] == 300


def test_limit_above_the_number_of_rows_takes_all(tmp_path):
    path = write_jsonl(tmp_path, records())
    whole, limited = build(tmp_path / "a", path), build(tmp_path / "b", path, train_limit=10_000, eval_limit=10_000)
    assert whole.record["files"] == limited.record["files"]


# validation


def values_by_split(artifact: Artifact, column: str) -> dict[str, set]:
    found: dict[str, set] = {}
    for row in artifact.rows("questions"):
        found.setdefault(row["split"], set()).add(row[column])
    return found


def test_validation_takes_a_share_of_the_training_images_only(tmp_path):
    path = write_jsonl(tmp_path / "data", records(400))
    plain, held = build(tmp_path / "a", path), build(tmp_path / "b", path, validation_share=0.25)
    images = values_by_split(held, "image_digest")
    assert not images["train"] & images["validation"] and not images["test"] & (images["train"] | images["validation"])
    before, after = values_by_split(plain, "question_id"), values_by_split(held, "question_id")
    assert after["test"] == before["test"] and after["train"] | after["validation"] == before["train"]
    assert 0.15 < len(images["validation"]) / len(images["train"] | images["validation"]) < 0.35
    assert held.facts["validation"] == len(after["validation"]) and held.facts["train"] == len(after["train"])


def test_more_rows_or_a_larger_share_keep_images_in_validation(tmp_path):
    small, large = write_jsonl(tmp_path / "small", records(200)), write_jsonl(tmp_path / "large", records(400))
    few, more, larger = (
        values_by_split(build(tmp_path / str(number), path, validation_share=share), "image_digest")["validation"]
        for number, (path, share) in enumerate([(small, 0.2), (large, 0.2), (small, 0.5)])
    )
    assert few <= more and few < larger


def test_validation_is_held_out_of_the_limited_questions(tmp_path):
    path = write_jsonl(tmp_path / "data", records(300))
    whole, held = (
        build(tmp_path / "a", path, train_limit=80),
        build(tmp_path / "b", path, train_limit=80, validation_share=0.25),
    )
    after = values_by_split(held, "question_id")
    assert after["train"] | after["validation"] == values_by_split(whole, "question_id")["train"]


def test_validation_share_enters_identity_only_above_zero(tmp_path):
    path = write_jsonl(tmp_path, records())
    assert fingerprint(path, validation_share=0.0) == fingerprint(path) != fingerprint(path, validation_share=0.1)


def test_validation_share_without_validation_questions_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected some of both"):
        build(tmp_path / "store", write_jsonl(tmp_path, records(20)), validation_share=1e-6)


# refusals


def test_too_many_rejections_are_refused_with_reasons_and_examples(tmp_path):
    rows = records()
    for i in range(20):
        rows[i]["answer"] = None
    rows[30]["question"], rows[31]["question"] = "", ""
    path = write_jsonl(tmp_path, rows)
    with pytest.raises(InputError) as caught:
        build(tmp_path / "store", path)
    line = str(caught.value)
    assert "22 of 200 rows (11.0%) rejected, more than data.max_rejected_share (5.0%)" in line
    assert "20 x answer is missing, e.g. q0; 2 x question is empty, e.g. q30" in line and "\n" not in line
    assert not list((tmp_path / "store").rglob("record.json")), "no artifact"
    rejected = list((tmp_path / "store").rglob("rejected/*.parquet"))
    assert str(rejected[0].parent) in line and pq.read_table(rejected[0]).num_rows == 22
    assert build(tmp_path / "store", path, max_rejected_share=0.11).facts["rejected"] == 22, (
        "the limit itself is tolerated"
    )


@pytest.mark.parametrize(("split", "name"), [("train", "evaluation"), ("test", "training")])
def test_an_empty_split_is_refused(tmp_path, split, name):
    path = write_jsonl(tmp_path, [{**r, "split": split} for r in records(10)])
    with pytest.raises(InputError, match=f"no row of 10 is left for {name}"):
        build(tmp_path / "store", path)


def test_an_empty_split_is_refused_with_the_remedy(tmp_path):
    path = write_jsonl(tmp_path, [{**r, "image": "images/0.png"} for r in records(10)])
    with pytest.raises(InputError, match=r'a column "split".* a tenth of the images .*\(found 1 different ones\)'):
        build(tmp_path / "store", path)


# images in both splits


def leaky_records() -> list[dict]:
    """Return 24 rows; the images 0 to 4 are in both splits, the others in one."""
    rows = records(24)
    return [r | dict(split="test" if i % 2 and i < 10 or i > 17 else "train") for i, r in enumerate(rows)]


def test_evaluation_questions_about_trained_images_are_counted(tmp_path):
    facts = build(tmp_path / "store", write_jsonl(tmp_path, leaky_records())).facts
    assert (facts["eval"], facts["leaked"]) == (11, 5)


def test_equal_images_in_different_files_are_one_image(tmp_path):
    rows = records(20)
    path = write_jsonl(tmp_path, [r | dict(split="test" if i > 9 else "train") for i, r in enumerate(rows)])
    for i in range(5):
        (tmp_path / "images" / f"{i + 5}.png").write_bytes(png(i))
    assert build(tmp_path / "store", path).facts["leaked"] == 10


def test_leaks_above_the_limit_are_refused(tmp_path):
    path = write_jsonl(tmp_path, leaky_records())
    assert build(tmp_path / "store", path, max_leaked_share=0.46).facts["leaked"] == 5
    message = (
        r"5 of 11 evaluation questions \(45.5%\) show an image that training also shows.*max_leaked_share \(0.0%\)"
    )
    with pytest.raises(InputError, match=message):
        build(tmp_path / "store", path, max_leaked_share=0.0)
    assert build(tmp_path / "none", write_jsonl(tmp_path, records()), max_leaked_share=0.0).facts["leaked"] == 0


def test_images_that_earlier_nights_trained_on_count_as_trained(tmp_path):
    rows = [r | dict(split="train") for r in records(10)]
    first = build_with_evaluation(tmp_path, "a", rows, None)
    second = build_with_evaluation(tmp_path, "b", [*rows, rows[0] | dict(id="new", split="test")], first)
    assert second.facts["train"] == 0 and second.facts["leaked"] == 1


def build_with_evaluation(folder: Path, name: str, rows: list[dict], known: Artifact | None) -> Artifact:
    """Build a night of these rows and two evaluation questions about another image."""
    more = [r | dict(split="test", id=f"test {r['id']}") for r in records(12)[10:]]
    return build_night(folder / "store", write_jsonl(folder / name, [*rows, *more]), known)


def test_only_selected_questions_count_as_leaked(tmp_path):
    path = write_jsonl(tmp_path, leaky_records())
    limited = build(tmp_path / "store", path, train_limit=3, eval_limit=4)
    train, test = (values_by_split(limited, "image_digest")[split] for split in ("train", "test"))
    leaked = sum(r["split"] == "test" and r["image_digest"] in train for r in question_rows(limited))
    assert limited.facts["leaked"] == leaked and len(train) <= 3 and len(test) <= 4


def test_source_of_broken_lines_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{\n[]\n")
    with pytest.raises(InputError, match=r"2 of 2 rows \(100.0%\) rejected"):
        build(tmp_path / "store", tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match="no row of 2 is left"):
        build(tmp_path / "store", tmp_path / "rows.jsonl", max_rejected_share=1.0)


class FakeSource:
    """A source whose second reading may differ from its first."""

    def __init__(self, *readings: list[RawRow]) -> None:
        self.readings = list(readings)

    def digest(self) -> str:
        return "0" * 64

    def rows(self):
        yield from self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]


def raw_rows(count: int, images: list[bytes] | None = None) -> list[RawRow]:
    pictures = images or [png(0)]
    splits = ("train", "test")
    return [RawRow(str(i), pictures[i * len(pictures) // count], f"{i}?", "yes", splits[i % 2]) for i in range(count)]


@pytest.mark.parametrize(
    "second",
    [
        raw_rows(9),
        raw_rows(11),
        raw_rows(10)[::-1],
        raw_rows(10, [png(1)]),
        [*raw_rows(9), RawRow("9", None, "9?", "yes", "test")],
        [*raw_rows(9), RawRow("9", png(0), 9, "yes", "test")],
    ],
)
def test_a_source_that_changes_between_the_passes_is_refused(tmp_path, second):
    source, storage = FakeSource(raw_rows(10), second), Storage(str(tmp_path))
    with pytest.raises(InputError, match="changed while it was read"):
        question_table.write_tables(make_config("given"), source, storage, "data/x")


def test_a_source_that_grows_before_the_first_pass_is_refused(tmp_path, monkeypatch):
    """Both passes read the new rows, but the identity was computed from the old ones."""
    path, validate_rows = write_jsonl(tmp_path, records(60)), question_selection.validate_rows
    config, storage = make_config(path), Storage(str(tmp_path / "store"))
    resources = open_resources(config, storage)
    run: Any = SimpleNamespace(config=config, resources=resources, storage=storage, known_data=None)
    monkeypatch.setattr(stage, "build_or_reuse", lambda run, identity, upstream, build: build())

    def add_row_and_validate(*arguments):
        path.write_text(path.read_text() + json.dumps(records(61)[60] | dict(image="images/0.png")) + "\n")
        return validate_rows(*arguments)

    monkeypatch.setattr(question_selection, "validate_rows", add_row_and_validate)
    with pytest.raises(InputError, match="changed while it was read"):
        stage.data.fn(run)


# layout


def write_questions_table(monkeypatch, tmp_path: Path, count: int, **constants) -> dict[str, list[dict]]:
    for name, value in constants.items():
        monkeypatch.setattr(question_table, name, value)
    storage = Storage(str(tmp_path))
    files, _ = question_table.write_tables(make_config("given"), FakeSource(raw_rows(count)), storage, "x")
    return {n: tables.decode(storage.read(f"x/{n}")).to_pylist() for n in sorted(files) if n.startswith("questions/")}


@pytest.mark.parametrize(("count", "digits"), [(4, 0), (5, 1), (64, 1), (65, 2)])
def test_number_of_buckets_follows_the_number_of_rows(monkeypatch, tmp_path, count, digits):
    files = write_questions_table(monkeypatch, tmp_path, count, BUCKET_ROWS=4)
    for name, rows in files.items():
        bucket = name.removeprefix("questions/").split("-")[0]
        assert len(bucket if bucket != "all" else "") == digits
        assert all(r["question_digest"].startswith(bucket if digits else "") for r in rows)
        assert rows == sorted(rows, key=lambda r: int(r["question_id"])), "in the source's order"
    assert sorted(int(r["question_id"]) for rows in files.values() for r in rows) == list(range(count))


def test_a_large_bucket_or_a_full_buffer_starts_a_new_file(monkeypatch, tmp_path):
    size = len(png(0)) + 5  # about a row
    by_file = write_questions_table(monkeypatch, tmp_path / "a", 10, FILE_BYTES=3 * size)
    assert list(by_file) == [f"questions/all-{k:03d}.parquet" for k in range(3)]
    limits = dict(BUCKET_ROWS=8, FILE_BYTES=1 << 30, BUFFER_BYTES=20 * size)
    by_buffer = write_questions_table(monkeypatch, tmp_path / "b", 100, **limits)
    assert max(len(rows) for rows in by_buffer.values()) <= 20
    assert any(name.endswith("-001.parquet") for name in by_buffer)
    assert sum(map(len, by_buffer.values())) == 100


def test_rejected_files_have_bounded_size(monkeypatch, tmp_path):
    monkeypatch.setattr(question_selection, "REJECTED_FILE_ROWS", 4)
    bad = [RawRow(str(i), png(0), "q?", None) for i in range(9)]
    artifact_files, facts = question_table.write_tables(
        make_config("given", max_rejected_share=0.9), FakeSource(raw_rows(10) + bad), Storage(str(tmp_path)), "x"
    )
    parts = [n for n in sorted(artifact_files) if n.startswith("rejected/")]
    assert [pq.read_table(tmp_path / "x" / n).num_rows for n in parts] == [4, 4, 1] and facts["rejected"] == 9


def test_memory_does_not_grow_with_the_rows(monkeypatch, tmp_path):
    for name, value in {"BUCKET_ROWS": 200, "FILE_BYTES": 1 << 20, "BUFFER_BYTES": 2 << 20}.items():
        monkeypatch.setattr(question_table, name, value)  # 16 buckets either way, and both fill the buffer
    pictures = []
    for _ in range(20):
        sink = io.BytesIO()
        Image.effect_noise((120, 120), 90).save(sink, "PNG")
        pictures.append(sink.getvalue())
    size = len(pictures[0])

    class CopyingSource(FakeSource):
        def rows(self):  # as from a file, every row has its own copy of the bytes
            for row in self.readings[0]:
                yield RawRow(row.id, bytes(bytearray(row.image)), row.question, row.answer, row.split)

    peaks = []
    for count in (1000, 3000):
        source = CopyingSource(raw_rows(count, pictures))
        gc.collect()
        tracemalloc.start()
        question_table.write_tables(make_config("given"), source, Storage(str(tmp_path / str(count))), "x")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert size * 2000 > 20 << 20, "the images alone would show"
    assert peaks[1] < peaks[0] + (1 << 20) and peaks[1] < 8 << 20


def test_removed_placeholders_and_numbers_reach_the_table(tmp_path):
    rows = [r | dict(question=f"<image>\n{r['question']}", answer=i, id=i) for i, r in enumerate(records(60))]
    artifact = build(tmp_path / "store", write_jsonl(tmp_path, rows))
    assert artifact.facts["remarks"] == {"image placeholder removed from the question": 60}
    found = {r["question_id"]: (r["question"], r["answer"]) for r in question_rows(artifact)}
    assert found == {str(i): (f"what is {i}?", str(i)) for i in range(60)}


# built-in sources


@pytest.mark.parametrize(
    ("source", "expected"),
    [("digits", "fae3300fd01a5208"), ("captions", "93cbef0ab599b51b"), ("easyvqa", "16de9c257f4f9c80")],
)
def test_identity_of_built_in_sources_stays(source, expected):
    """Committed results of studies name these artifacts: what is done to rows of other sources must not reach them."""
    assert fingerprint(source, train_limit=100) == expected


def test_easyvqa_with_limits(tmp_path):
    artifact = build(tmp_path, "easyvqa", train_limit=50, eval_limit=50)
    rows = question_rows(artifact)
    assert artifact.facts == {
        "rows": 100,
        "rejected": 0,
        "read": 48248,
        "train": 50,
        "eval": 50,
        "reasons": {},
        "known": 0,
        "leaked": 0,
        "remarks": {},
    }
    assert all(r["question_id"].startswith(r["split"]) for r in rows)
    assert all(Image.open(io.BytesIO(r["image"])).size == (64, 64) for r in rows)
    assert {r["category"] for r in rows} == {"color", "shape", "color-yes-no", "shape-yes-no"}


def test_known_training_questions_are_left_out_over_all_nights(tmp_path: Path) -> None:
    """Each night's table holds the new training questions and all evaluation questions."""
    rows = records(60)
    parts = [rows[:40], rows[:50], [r | {"answer": "changed"} if r["id"] == "q3" else r for r in rows]]
    artifact, seen = None, set()
    for number, part in enumerate(parts):
        source = write_jsonl(tmp_path / f"{number}", part)
        artifact, whole = build_night(tmp_path / "store", source, artifact), build(tmp_path / "whole", source)
        assert question_ids(artifact, "test") == question_ids(whole, "test")
        everything = {(r["question_id"], r["question_digest"]) for r in question_rows(whole) if r["split"] == "train"}
        taken = {(r["question_id"], r["question_digest"]) for r in question_rows(artifact) if r["split"] == "train"}
        assert taken == everything - seen
        assert artifact.facts["known"] == len(everything & seen)
        seen |= everything
    assert "q3" in question_ids(artifact, "train") | question_ids(artifact, "test")


def test_night_without_new_training_questions_is_accepted(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "data", records(40))
    first = build(tmp_path / "store", source)
    second = build_night(tmp_path / "store", source, first)
    assert second.facts["train"] == 0 and second.facts["eval"] == first.facts["eval"]
