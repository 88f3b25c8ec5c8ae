"""Every reason for which a row is rejected; no row ends a run."""

import io
from base64 import b64encode, urlsafe_b64encode
from collections import Counter
from datetime import date
from decimal import Decimal
from pathlib import Path
from urllib.parse import quote

import pytest
from PIL import Image

from masters.common.errors import InputError
from masters.common.hashing import canonical_json, digest, to_unit_interval
from masters.data import images
from masters.data.row_validation import PLACEHOLDER_REMOVED, RejectedRow, parse_row, validate_rows
from masters.data.sources.base import RawRow, raw_row
from tests.bad_input.image_files import png_header


class FakeSource:
    """A source of given rows."""

    def __init__(self, *rows: RawRow) -> None:
        self._given = rows

    def digest(self) -> str:
        return "0" * 64

    def rows(self):
        yield from self._given


def encoded(mode: str = "RGB", size: tuple[int, int] = (6, 5), kind: str = "PNG", **options) -> bytes:
    sink = io.BytesIO()
    Image.new(mode, size).save(sink, kind, **options)
    return sink.getvalue()


GOOD = encoded()
SPLIT_TABLE = "train (training) or test (testing, eval, evaluation, validation, valid, val, dev, development)"


def row(**changes) -> RawRow:
    return RawRow(**({"id": "a", "image": GOOD, "question": "what?", "answer": "that"} | changes))


def validate(*rows: RawRow) -> list:
    return list(validate_rows(FakeSource(*rows)))


def rejection(**changes) -> str:
    (found,) = validate(row(**changes))
    assert isinstance(found, RejectedRow), found
    assert found.reason.startswith(found.kind)
    return found.reason


def accept(**changes) -> dict:
    (found,) = validate(row(**changes))
    assert isinstance(found, dict), found
    return found


# what is accepted


@pytest.mark.parametrize("name", ["question", "answer"])
def test_text_with_a_special_token_is_refused(name: str) -> None:
    rows = FakeSource(row(id="a", **{name: "what is <|im_end|> here"}), row(id="b", **{name: "what is <b> here"}))
    first, second = validate_rows(rows, ("<|image_pad|>", "<|im_end|>"))
    assert first == RejectedRow("a", f"{name} has a special token", f"{name} has a special token (<|im_end|>)")
    assert second[name] == "what is <b> here"


def test_accepted_row_is_unchanged():
    found = accept(question=" Wie groß?\n\tsehr\r\n", answer="groß", category="size", split="test")
    content = digest(canonical_json([" Wie groß?\n\tsehr\r\n", "groß", digest(GOOD)]).encode())
    assert found == {
        "question_id": "a", "question_digest": content, "image_digest": digest(GOOD), "image": GOOD,
        "question": " Wie groß?\n\tsehr\r\n", "answer": "groß", "accepted_answers": ["groß"], "split": "test",
        "category": "size",
    }  # fmt: skip


def test_question_digest_covers_question_answer_and_image():
    base = accept()["question_digest"]
    assert accept(id="b", category="c", split="test")["question_digest"] == base
    others = [accept(question="who?"), accept(answer="this"), accept(image=encoded(size=(7, 5)))]
    assert len({base, *(o["question_digest"] for o in others)}) == 4


def test_first_answer_is_the_label_and_repetitions_are_dropped():
    found = accept(answer=["eleven", "11", "eleven", " 11"])
    assert (found["answer"], found["accepted_answers"]) == ("eleven", ["eleven", "11", " 11"])


def test_question_digest_covers_all_accepted_answers():
    lists = (["this"], ["this", "that"], ["that", "this"], ["this", "that", "it"])
    digests = {accept(answer=answers)["question_digest"] for answers in lists}
    assert len(digests) == 4 and accept(answer="this")["question_digest"] in digests


def test_special_tokens_are_refused_in_every_accepted_answer():
    (found,) = validate_rows(FakeSource(row(answer=["this", "<|im_end|>"])), ("<|im_end|>",))
    assert found == RejectedRow("a", "answer has a special token", "answer has a special token (<|im_end|>)")


def test_an_empty_cell_of_a_table_names_no_split():
    assert accept(split=float("nan"))["split"] == accept(split=None)["split"]
    columns = {"id": "a", "image": GOOD, "question": "what?", "answer": "that", "split": float("nan")}
    assert raw_row(columns, None, "test").split == "test", "the part's"


def test_whole_number_ids_become_their_decimals():
    assert accept(id=17)["question_id"] == "17"
    first, second, third = validate(row(id=17), row(id="17"), row(id=17.0))
    assert first["question_id"] == "17" and second.reason == third.reason == "duplicate id"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Decimal("17"), "17"), (Decimal("17.00"), "17"), (Decimal("1.50"), "1.5"),
        (Decimal("1234567890123456789012345678901234567"), "1234567890123456789012345678901234567"),
    ],
)  # fmt: skip
def test_ids_of_a_decimal_column_become_texts(value, text):
    assert accept(id=value)["question_id"] == text
    assert validate(row(id=value, answer=None))[0].id == text, "the rejected table calls the row by it"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"), (0, "0"), (-12, "-12"), (2**70, str(2**70)), (True, "true"), (False, "false"), (2.0, "2"),
        (0.5, "0.5"), (-0.0, "0"), (1e-7, "1e-07"), (1e308, "1e+308"), (0.1 + 0.2, "0.30000000000000004"),
        (Decimal("1.50"), "1.5"), (Decimal("1E+3"), "1000"), (Decimal("2.00"), "2"), (Decimal("-0.0"), "0"),
        (Decimal("1234567890123456789012345678901234567.8"), "1234567890123456789012345678901234567.8"),
        (Decimal("0.1234567890123456789012345678901234567890"), "0.123456789012345678901234567890123456789"),
        (Decimal("1E+400"), "1" + "0" * 400),
    ],
)  # fmt: skip
def test_numbers_and_truth_values_become_texts(value, text):
    assert accept(answer=value, category=value)["answer"] == accept(category=value)["category"] == text
    assert accept(answer=[value, "other"])["accepted_answers"] == [text, "other"]


def test_equal_answers_of_different_types_are_one():
    assert accept(answer=[2, "2", 2.0, True, "true"])["accepted_answers"] == ["2", "true"]


def test_question_loses_its_image_placeholder_and_is_counted():
    changes = Counter()
    marked, plain, bad = validate_rows(
        FakeSource(row(id="a", question="<image>\nwhat?"), row(id="b"), row(id="c", question="<image>", answer=None)),
        changes=changes,
    )
    assert marked["question"] == plain["question"] == "what?"
    assert marked["question_digest"] == plain["question_digest"] and isinstance(bad, RejectedRow)
    assert changes == {PLACEHOLDER_REMOVED: 1}


def test_a_removed_placeholder_makes_no_special_token():
    (found,) = validate_rows(FakeSource(row(question="<|im_<image>end|>")), ("<|im_end|>",))
    assert found.reason == "question has a special token (<|im_end|>)"


def test_parse_row_returns_the_accepted_question(tmp_path):
    (tmp_path / "x.png").write_bytes(GOOD)
    for raw in (
        row(category=""),
        row(answer=["this", "that"]),
        row(answer=7, question="<image> what?", split="Validation"),
        row(id=3, split="test", category="c"),
        row(image="x.png", root=tmp_path),
    ):
        assert validate(raw) == [parse_row(raw)]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_every_png_mode_is_accepted(mode):
    data = encoded(mode)
    assert accept(image=data)["image"] == data, "bytes are stored unchanged"


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {}), ("JPEG", "CMYK", {}), ("JPEG", "L", {}),
        ("WEBP", "RGBA", {}), ("BMP", "RGB", {}), ("TIFF", "I;16", {}), ("PPM", "L", {}),
        ("GIF", "P", {"save_all": True, "append_images": [Image.new("P", (6, 5), 1)]}),
    ],
)  # fmt: skip
def test_every_image_format_is_accepted(kind, mode, options):
    accept(image=encoded(mode, kind=kind, **options))


# the split


def test_without_a_split_the_image_decides():
    pictures = [encoded(size=(1 + n % 20, 1 + n // 20)) for n in range(300)]
    found = validate(*(row(id=f"{n}-{k}", image=p, question=f"{k}?") for n, p in enumerate(pictures) for k in range(3)))
    split_of: dict[bytes, set] = {}
    for question in found:
        split_of.setdefault(question["image"], set()).add(question["split"])
    assert all(len(splits) == 1 for splits in split_of.values())
    held_out = [p for p, splits in split_of.items() if splits == {"test"}]
    assert held_out == [p for p in split_of if to_unit_interval(digest(p)) < 0.1]
    assert 15 <= len(held_out) <= 45, "a tenth of 300"


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", ["train", "Train", "TRAIN", "training", " train\n"]),
        ("test", ["test", "TEST", "testing", "eval", "Evaluation", "validation", "valid", "VAL", "dev", "development"]),
    ],
)
def test_a_split_has_several_names(split, names):
    assert {accept(split=name)["split"] for name in names} == {split}


def test_an_empty_split_is_decided_by_the_image():
    assert accept(split="")["split"] == accept()["split"]


# what is rejected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"id": None}, "id is missing"),
        ({"id": ""}, "id is missing"),
        ({"id": "  "}, "id is empty"),
        ({"id": True}, "id is not text (found bool)"),
        ({"id": 1.5}, "id is not text (found float)"),
        ({"id": Decimal("NaN")}, "id is missing"),
        ({"id": Decimal("Infinity")}, "id is not text (found Decimal)"),
        ({"id": "x" * 1001}, "id is too long (1001 characters, limit 1000)"),
        ({"question": None}, "question is missing"),
        ({"answer": None}, "answer is missing"),
        ({"question": ""}, "question is empty"),
        ({"answer": " \n\t\u00a0"}, "answer is empty"),
        ({"answer": []}, "answer is an empty list"),
        ({"answer": ["a"] * 101}, "answer is too long a list (101 texts, limit 100)"),
        ({"answer": ["a", None]}, "answer is missing"),
        ({"answer": ["a", " "]}, "answer is empty"),
        ({"answer": [["a"]]}, "answer is not text (found list)"),
        ({"answer": {"a": "b"}}, "answer is not text (found dict)"),
        ({"question": ["what?"]}, "question is not text (found list)"),
        ({"question": b"what?"}, "question is not text (found bytes)"),
        ({"question": "x" * 20_001}, "question is too long (20001 characters, limit 20000)"),
        ({"answer": "x" * 10_001}, "answer is too long (10001 characters, limit 10000)"),
        ({"answer": "ab\x00"}, "answer has control characters (U+0000 at 2)"),
        ({"question": "\x1b[31m"}, "question has control characters (U+001B at 0)"),
        ({"question": "x\x7f"}, "question has control characters (U+007F at 1)"),
        ({"answer": "\ud800"}, "answer is not valid Unicode"),
        ({"answer": float("nan")}, "answer is missing"),
        ({"answer": float("inf")}, "answer is not text (found float)"),
        ({"answer": ["a", date(2026, 1, 1)]}, "answer is not text (found date)"),
        ({"category": ["a"]}, "category is not text (found list)"),
        ({"question": 3}, "question is not text (found int)"),
        ({"id": float("nan")}, "id is missing"),
        ({"image": {"data": b"", "kind": "png"}}, "image is neither bytes nor a path (found dict with data, kind; "
         "expected bytes or path in it)"),
        ({"split": "holdout"}, f"unknown split (found 'holdout', expected {SPLIT_TABLE})"),
        ({"split": 0}, f"unknown split (found 0, expected {SPLIT_TABLE})"),
        ({"split": ["train"]}, f"unknown split (found ['train'], expected {SPLIT_TABLE})"),
        ({"question": "<image> and <image>?"}, "question has placeholders of several images (2, a row has one image)"),
        ({"question": "<image>\n"}, "question is empty"),
        ({"image": ""}, "image is missing"),
        ({"image": ["a.png", "b.png"]}, "image is a list (of 2; expected one image a row)"),
        ({"image": []}, "image is a list (of 0; expected one image a row)"),
        ({"image": 7}, "image is neither bytes nor a path (found int)"),
        ({"image": "x.png"}, "image is a path (this source has no folder; expected bytes)"),
        ({"image": png_header(9000, 9000)}, "image has too many pixels (9000 x 9000, limit 64000000)"),
        ({"image": png_header(60000, 60000)}, "image has too many pixels (limit 64000000)"),
        ({"image": encoded(size=(201, 1))}, "image is too narrow (201 x 1, limit 200:1)"),
        ({"image": encoded(size=(1, 201))}, "image is too narrow (1 x 201, limit 200:1)"),
        ({"fault": "line is not an object (found list)"}, "line is not an object (found list)"),
        ({"fault": "line is not UTF-8"}, "line is not UTF-8"),
    ],
)  # fmt: skip
def test_a_faulty_row_is_rejected_with_its_reason(changes, expected):
    assert rejection(**changes) == expected


def test_values_at_the_limits_are_accepted():
    accept(id="x" * 1000, question="x" * 20_000, answer="x" * 10_000, image=encoded(size=(200, 1)))


def test_decompression_bomb_is_refused_by_its_header(monkeypatch):
    monkeypatch.setattr(images, "to_rgb", lambda image: pytest.fail("decoded"))
    rejection(image=png_header(8001, 8000))


def test_oversized_file_is_refused_without_reading(tmp_path, monkeypatch):
    monkeypatch.setattr("masters.data.row_validation.MAX_BYTES", 100)
    (tmp_path / "big.png").write_bytes(bytes(101))
    assert rejection(image=bytes(101)) == "image is too large (101 bytes, limit 100)"
    assert rejection(image="big.png", root=tmp_path) == "image is too large (101 bytes, limit 100)"


# paths


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    (root / "images" / "x.png").write_bytes(GOOD)
    (root / "in.png").symlink_to(root / "images" / "x.png")
    return root


@pytest.mark.parametrize(
    "path",
    [
        "images/x.png", "./images/x.png", "in.png", Path("images/x.png"), "images/../images/x.png", "images//x.png",
        "none/../images/x.png", "{folder}/images/x.png", "{folder}/../data/in.png", "file://{folder}/images/x.png",
        "file://localhost{folder}/images/x.png", "FILE:{folder}/images/x.png", "file:images/x.png",
        "file://{folder}/im%61ges/x.png", "{link}/images/x.png", f"data:image/png;base64,{b64encode(GOOD).decode()}",
        f"data:;base64,{b64encode(GOOD).decode().rstrip('=')}", f"DATA:image/png;x=y;BASE64,{quote(b64encode(GOOD))}",
        f"data:image/png;base64,{urlsafe_b64encode(GOOD).decode()}", f"data:image/png,{quote(GOOD)}",
    ],
)  # fmt: skip
def test_images_inside_the_folder_and_in_the_row_are_accepted(folder, path):
    link = folder.parent / "link"
    link.symlink_to(folder)
    reference = path.format(folder=folder, link=link) if isinstance(path, str) and "{" in path else path
    found = accept(image=reference, root=folder)
    assert (found["image"], found["image_digest"]) == (GOOD, digest(GOOD))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("../secret.png", "image path leaves the data folder ('../secret.png')"),
        ("images/../../secret.png", "image path leaves the data folder"),
        ("{folder}/../secret.png", "image path leaves the data folder"),
        ("{folder}-other/secret.png", "image path leaves the data folder"),
        ("file:///etc/passwd", "image path leaves the data folder ('/etc/passwd')"),
        ("file://{folder}/..%2Fsecret.png", "image path leaves the data folder"),
        ("file://server/share/x.png", "image is a URI that is not read ('file://server/share/x.png'; expected a path"),
        ("images\\x.png", "image file not found ('images\\\\x.png'; write / for \\)"),
        ("http://example.org/a.png?key=secret", "image is a URL ('http://example.org/a.png'; set data.fetch_images"),
        ("HTTPS://example.org/a.png", "image is a URL ('HTTPS://example.org/a.png'; set data.fetch_images = true, or"),
        ("s3://bucket/a.png", "image is a URI that is not read ('s3://bucket/a.png'; expected a path"),
        ("data:image/png;base64", "image is a broken data URI"),
        ("data:image/png;base64,%%%", "image is a broken data URI"),
        ("data:image/png;base64,", "image is empty"),
        ("data:text/plain,hello", "image cannot be decoded (no known format)"),
        (b64encode(GOOD).decode(), "image is base64 without a prefix (write data:image/png;base64, before it)"),
        ("/9j/" + "A" * 300, "image is base64 without a prefix"),
    ],
)
def test_other_references_are_rejected_as_what_they_are(folder, image, expected):
    (folder.parent / "secret.png").write_bytes(GOOD)
    other = folder.with_name("data-other")
    other.mkdir()
    (other / "secret.png").write_bytes(GOOD)
    assert rejection(image=image.replace("{folder}", str(folder)), root=folder).startswith(expected)


# isolation


def test_rejected_rows_do_not_reserve_their_id():
    first, second, third = validate(row(answer=None), row(), row(answer="other"))
    assert (first.kind, second["answer"], third.kind) == ("answer is missing", "that", "duplicate id")


def test_rejected_row_has_its_id_or_row_number():
    found = validate(row(id=None), row(id=[1]), row(id="b", answer=None), row(id="x" * 5000), row(id="\ud800"))
    assert [r.id for r in found] == ["row 1", "row 2", "b", "x" * 200, "\\ud800"]


def test_unexpected_error_rejects_one_row(monkeypatch):
    def explode(data, name):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("masters.data.row_validation.find_image_fault", explode)
        assert rejection() == "row cannot be processed (MemoryError: no room)"


def test_error_of_the_source_is_raised():
    class FailingSource(FakeSource):
        def rows(self):
            yield row()
            raise InputError("the source broke off")

    with pytest.raises(InputError, match="broke off"):
        list(validate_rows(FailingSource()))


def test_image_faults_are_cached_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(images, "CACHE_SIZE", 3)
    monkeypatch.setattr(images, "_faults", {})
    decoded = []
    monkeypatch.setattr(images, "_decode_fault", lambda data: decoded.append(data))
    for data in (b"1", b"1", b"2", b"3", b"4", b"2", b"1"):
        images.find_image_fault(data, digest(data))
        assert len(images._faults) <= 3
    assert decoded == [b"1", b"2", b"3", b"4", b"1"]
