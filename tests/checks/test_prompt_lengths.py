"""Prompts that leave no room for a response are counted before work starts, and refused if none fits."""

import json
from pathlib import Path

import pytest

from masters.checks import prompt_lengths
from masters.checks.preflight import preflight
from masters.checks.prompt_lengths import PromptLengths, UnmeasuredRows, check_prompt_lengths
from masters.common.errors import InputError
from masters.config import Data
from masters.data.sources import open_source
from masters.models.prompts import model_inputs
from tests.data.source_files import records, write_jsonl
from tests.handmade_run import make_config
from tests.shape_data import write_questions, write_rows

LIMIT = 256  # tokens of prompt and response


def write_source(folder: Path, long_ids: dict[int, int], count: int = 12) -> Path:
    """Write questions, a quarter of them test rows, with this many words added to some of them by number."""
    path = write_questions(folder, count, bad=False)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, words in long_ids.items():
        rows[number]["question"] += " circle?" * words
    return write_rows(folder, rows)


def check(folder: Path, source: Path, **sections: dict) -> list[str]:
    config = make_config(folder / "store", source, runtime=dict(max_model_len=LIMIT), **sections)
    return check_prompt_lengths(config, preflight(config))


def test_prompts_that_fit_give_no_warning(tmp_path: Path) -> None:
    assert check(tmp_path, write_source(tmp_path / "data", {})) == []


def test_some_long_prompts_are_counted_by_split(tmp_path: Path) -> None:
    warnings = check(tmp_path, write_source(tmp_path / "data", {1: 500, 2: 500, 4: 500}))
    assert len(warnings) == 2
    assert "1 of 3 prompts of split 'test' are too long: with generate.max_tokens = 8" in warnings[0]
    assert (
        "2 of 9 prompts of split 'train' are too long" in warnings[1] and "raise runtime.max_model_len" in warnings[1]
    )


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_of_long_prompts_only_is_refused(tmp_path: Path, split: str, capfd: pytest.CaptureFixture[str]) -> None:
    numbers = [number for number in range(12) if (number % 4 == 0) == (split == "test")]
    source = write_source(tmp_path / "data", dict.fromkeys(numbers, 500))
    with pytest.raises(InputError, match=f"{len(numbers)} of {len(numbers)} prompts of split '{split}' are too long"):
        check(tmp_path, source)
    assert "sequence length" not in capfd.readouterr().err  # a warning of the tokenizer


def test_training_prompts_may_be_long_if_no_engine_answers_them(tmp_path: Path) -> None:
    source = write_source(tmp_path / "data", dict.fromkeys([n for n in range(12) if n % 4], 500))
    labels = dict(targets="labels", objective="kd", learning_rate=1e-3, questions_per_step=4)
    assert check(tmp_path, source, train=labels) == []


def test_the_limit_is_exact(tmp_path: Path) -> None:
    """The longest prompt that an engine takes is not counted, one token more is."""
    source = write_source(tmp_path / "data", {1: 20})
    row = json.loads(source.read_text().splitlines()[1])
    config = make_config(tmp_path / "store", source)
    resources = preflight(config)
    from transformers import AutoProcessor

    image = (source.parent / row["image"]).read_bytes()
    processor = AutoProcessor.from_pretrained(resources.student.folder)
    tokens = model_inputs(processor, row["question"], image)["input_ids"].shape[1]
    for limit, count in ((tokens, 0), (tokens - 1, 1)):
        assert prompt_lengths.measure_splits(config, resources, ["train"], limit)["train"].too_long == count


@pytest.mark.parametrize("test_name", ["test", "Validation", "dev"])
@pytest.mark.parametrize("train_name", ["train", "Training"])
def test_rows_of_a_measured_split_are_skipped_under_any_of_its_names(
    tmp_path: Path, test_name: str, train_name: str
) -> None:
    """Their images are not decoded. Rows without a split may belong to either."""
    names = (test_name, train_name, None)
    rows = [row | dict(split=name) for row, name in zip(records(3), names, strict=True)]
    source = open_source(Data(source=str(write_jsonl(tmp_path, rows))))
    done = PromptLengths(measured=prompt_lengths.MEASURED_PROMPTS)
    for lengths, skipped in (
        ({"test": done, "train": PromptLengths()}, test_name),
        ({"test": PromptLengths(), "train": done}, train_name),
    ):
        found = [row.split for row in UnmeasuredRows(source, lengths).rows()]
        assert found == [name for name in names if name != skipped]


def test_a_split_is_measured_until_one_prompt_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_lengths, "MEASURED_PROMPTS", 2)
    source = write_source(tmp_path / "data", dict.fromkeys(range(11), 500))  # only the last row fits, a training row
    config = make_config(tmp_path / "store", source)
    lengths = prompt_lengths.measure_splits(config, preflight(config), ["train", "test"], LIMIT)
    assert (lengths["train"].measured, lengths["train"].too_long) == (9, 8)
    assert (lengths["test"].measured, lengths["test"].too_long) == (3, 3)
