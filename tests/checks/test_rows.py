"""`masters check` on rows: what it prints, and that it refuses what the data stage would refuse."""

from pathlib import Path
from typing import Any

import pytest

from masters.checks.preflight import Resources
from masters.checks.rows import describe_rows, list_row_warnings, select_valid_rows
from masters.common.errors import InputError
from masters.config import Config
from masters.data.question_selection import Selection
from masters.data.sources import open_source
from tests.data.source_files import records, write_jsonl


def select(source: Path, **data: Any) -> Selection:
    config = Config.model_validate(
        dict(
            name="test",
            store=dict(root="unused"),
            data=dict(source=str(source)) | data,
            student=dict(model="s"),
            teachers=[dict(model="t")],
        )
    )
    nothing: Any = None
    return select_valid_rows(config, Resources(nothing, open_source(config.data), nothing, [], ("<|im_end|>",)))


def test_counts_rejections_changes_and_categories_are_printed(tmp_path: Path) -> None:
    rows = records(40, category="shape")
    rows = [row | dict(split="train" if number % 4 else "Validation") for number, row in enumerate(rows)]
    rows[1]["answer"], rows[2]["answer"], rows[3]["question"] = [], [], "<|im_end|>"
    rows[5] |= dict(question=f"<image> {rows[5]['question']}", category="color")
    lines = list(describe_rows(select(write_jsonl(tmp_path, rows), max_rejected_share=0.1, train_limit=20)))
    assert lines == [
        "rows       40 read, 3 rejected (7.5%); selected 20 for training, 10 for evaluation",
        "rejected   2 x answer is an empty list, e.g. q1",
        "rejected   1 x question has a special token (<|im_end|>), e.g. q3",
        "changed    1 x image placeholder removed from the question",
        "categories shape 36, color 1",
    ]


def test_many_categories_are_summed_up(tmp_path: Path) -> None:
    rows = [row | dict(category=f"c{number:02}") for number, row in enumerate(records(60))]
    last = [*describe_rows(select(write_jsonl(tmp_path, rows)))][-1]
    assert last.startswith("categories c00 1, c01 1") and last.endswith(" and 52 more")


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        (dict(answer=None), {}, r"40 of 40 rows \(100.0%\) rejected, .*answer is missing, e.g. q0$"),
        (dict(split="train"), {}, 'no row of 40 is left for evaluation .*a column "split"'),
        (dict(split="dev"), {}, 'no row of 40 is left for training .*a column "split"'),
        (dict(image="images/0.png"), {}, r"left for evaluation .*\(found 1 different ones\)"),
        ({}, dict(validation_share=1e-9), "expected some of both"),
    ],
)
def test_what_the_data_stage_refuses_is_refused(tmp_path: Path, changes: dict, settings: dict, message: str) -> None:
    rows = [row | dict(split="train" if number % 3 else "test") | changes for number, row in enumerate(records(40))]
    if "image" in changes:
        rows = [{key: value for key, value in row.items() if key != "split"} for row in rows]
    with pytest.raises(InputError, match=message):
        select(write_jsonl(tmp_path, rows), **settings)


def test_leaks_are_warned_of_or_refused(tmp_path: Path) -> None:
    rows = [row | dict(split="train" if number % 2 else "test") for number, row in enumerate(records(40))]
    path = write_jsonl(tmp_path, rows)
    (warning,) = list_row_warnings(select(path))
    assert warning.startswith("20 of 20 evaluation questions (100.0%) show an image that training also shows")
    with pytest.raises(InputError, match="max_leaked_share"):
        select(path, max_leaked_share=0.0)
    assert not list_row_warnings(select(write_jsonl(tmp_path / "clean", records(100))))


def test_validation_questions_are_counted(tmp_path: Path) -> None:
    selection = select(write_jsonl(tmp_path, records(200)), validation_share=0.2)
    splits = selection.splits
    assert f"{splits['train']} for training, {splits['validation']} for validation, {splits['test']}" in "".join(
        describe_rows(selection)
    )
    assert splits["validation"] > 0 and selection.selected == 200
