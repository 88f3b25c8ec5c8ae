"""Captions from the command line: the demo's judge rewards and evaluates, held against the rules that read captions."""

from pathlib import Path

import pytest

from demo.wordings import describes
from tests.command_line import masters, options, read_json, rows

STAGES = ["data", "mask", "generate", "score", "train", "evaluate", "register"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captions")
    (folder / "home").mkdir()
    return folder


def settings(place: Path, **others: object) -> list[str]:
    values = {"store.root": place / "store", "data.train_limit": 24, "data.eval_limit": 40, "train.warmup_steps": 0}
    return options(values | others)


@pytest.fixture(scope="module")
def first(place: Path, prefect: dict[str, str]) -> dict:
    return read_json(
        masters("distill", "configs/captions.toml", *settings(place), "--json", home=place / "home", **prefect)
    )


@pytest.mark.slow
def test_the_judge_rewards_and_evaluates_as_the_rules_would(first: dict) -> None:
    assert [stage["name"] for stage in first["stages"]] == STAGES
    assert first["metric"] == "accuracy by judge captions-judge"
    labels = {row["question_id"]: row["answer"] for row in rows(first, "data", "questions")}
    texts = {
        (row["question_id"], row["source"], row["mask_ratio"], row["sample"]): row["text"]
        for row in rows(first, "generate", "responses")
    }
    verdicts = [
        (row["score"], float(describes(texts[key], labels[row["question_id"]])))
        for row in rows(first, "score", "verdicts")
        if (key := (row["question_id"], row["source"], row["mask_ratio"], row["sample"]))
    ]
    assert len(verdicts) == 24 * 8 and {truth for _, truth in verdicts} == {0.0, 1.0}
    assert sum(score == truth for score, truth in verdicts) / len(verdicts) >= 0.95
    predictions = rows(first, "evaluate", "predictions")
    truths = [describes(row["text"], labels[row["question_id"]]) for row in predictions]
    assert len(predictions) == 3 * 40
    assert sum(row["correct"] == truth for row, truth in zip(predictions, truths, strict=True)) / 120 >= 0.95
    right = {row["model"]: 0 for row in predictions}
    for row in predictions:
        right[row["model"]] += row["correct"]
    scores = [*first["teachers"], dict(name="student-before") | first["student"]["before"]]
    assert {s["name"]: s["accuracy"] for s in scores} == {s["name"]: right[s["name"]] / 40 for s in scores}
    judged = {row["text"] for row in rows(first, "evaluate", "judgements")}
    assert judged == {row["text"] for row in predictions}


@pytest.mark.slow
def test_labels_need_the_judge_for_evaluation_alone(first: dict, place: Path, prefect: dict[str, str]) -> None:
    """No response is asked for and none judged; what both runs answered is judged once."""
    others = settings(place, **{"train.objective": "sft", "train.targets": "labels"})
    done = read_json(masters("distill", "configs/captions.toml", *others, "--json", home=place / "home", **prefect))
    stages = {stage["name"]: stage for stage in done["stages"]}
    assert list(stages) == [name for name in STAGES if name not in ("generate", "score")]
    after = [row for row in rows(done, "evaluate", "predictions") if row["model"] == "student-after"]
    assert stages["evaluate"]["asked"] <= len({row["text"] for row in after}) * 3  # questions by their wording
    assert done["student"]["before"]["accuracy"] == first["student"]["before"]["accuracy"]
