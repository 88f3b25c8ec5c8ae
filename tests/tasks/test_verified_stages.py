"""Score and evaluate by a verifier, on questions with several accepted answers and responses written by the test."""

import json
from pathlib import Path

import pytest

from masters.models.generation import shards
from masters.store import tables
from masters.store.artifacts import Artifact
from masters.tasks import evaluate
from masters.tasks.data import data
from masters.tasks.register import render_card
from masters.tasks.run_context import Run
from masters.tasks.score import score
from tests.handmade_run import first_round, make_run, write_table
from tests.shape_data import write_questions, write_rows

ACCEPTED = ["4 + 0 + 7 = 11", "eleven"]
SCORES = {"11": 1.0, "So the answer is Eleven.": 1.0, "4 + 0 + 7 = 11": 1.0, "12": 0.0, "4 + 0 + 7 = 12": 0.0, "": 0.0}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    rows = [json.loads(line) for line in write_questions(folder, 12, bad=False).read_text().splitlines()]
    return write_rows(folder, [row | dict(answer=ACCEPTED) for row in rows])


def write_responses(run: Run, questions: Artifact) -> Artifact:
    """Write a response of each text of `SCORES` to every question."""
    ids = [
        row["question_id"] for row in questions.rows("questions", ["question_id", "split"]) if row["split"] == "train"
    ]
    rows = [
        dict(question_id=question, source="teacher", mask_ratio=0.2, sample=sample, model="t", text=text)
        for question in ids
        for sample, text in enumerate(SCORES)
    ]
    return write_table(run, "responses", rows, tables.RESPONSES)


def write_predictions(run: Run, questions: Artifact) -> None:
    """Write the shards that `evaluate` requests of the student, as if an engine had answered "11"."""
    for request in evaluate.prediction_requests(run, questions, [run.resources.student]):
        rows = [
            dict(question_id=ref.question_id, model=request.model.name, text="11", finish_reason="stop")
            for ref in request.shard.refs
        ]
        run.storage.create(request.file, tables.encode(rows, tables.PREDICTED))


def run_evaluation(run: Run, questions: Artifact) -> Artifact:
    return evaluate.evaluate.fn(run, questions, [run.resources.student])


def test_score_uses_the_verifier_with_every_accepted_answer(tmp_path: Path, source: Path) -> None:
    found = {}
    for verifier in ("final", "exact"):
        run = make_run(tmp_path / "store", source, answers=dict(verifier=verifier))
        questions = data.fn(run)
        rows = score.fn(run, first_round(run), questions, write_responses(run, questions)).rows("verdicts")
        found[verifier] = [(list(SCORES)[row["sample"]], row["score"], row["judge"]) for row in rows]
    assert set(found["final"]) == {(text, right, "final-1") for text, right in SCORES.items()}
    assert len(found["final"]) == 9 * len(SCORES)
    assert {text for text, right, _ in found["exact"] if right} == {"4 + 0 + 7 = 11"}


def test_another_verifier_evaluates_stored_answers_without_an_engine(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_plan_work", lambda *_: pytest.fail("an engine would run"))
    runs = {
        name: make_run(tmp_path / "store", source, answers=dict(verifier=name)) for name in ("final", "exact", "number")
    }
    questions = data.fn(runs["final"])
    write_predictions(runs["final"], questions)
    artifacts = {verifier: run_evaluation(run, questions) for verifier, run in runs.items()}
    assert len({artifact.fingerprint for artifact in artifacts.values()}) == 3
    for verifier, right in dict(final=True, exact=False, number=True).items():
        table = tables.read(runs[verifier].storage, artifacts[verifier].files("predictions")[0])
        assert table.schema.equals(tables.PREDICTIONS)
        assert {(row["text"], row["correct"]) for row in artifacts[verifier].rows("predictions")} == {("11", right)}
        (score_row,) = artifacts[verifier].facts["scores"].values()
        assert (score_row["accuracy"], score_row["n"]) == (float(right), 3)


def test_model_card_names_the_verifier(tmp_path: Path, source: Path) -> None:
    run = make_run(tmp_path / "store", source, answers=dict(verifier="final", final_pattern="is (.*)"))
    questions = data.fn(run)
    write_predictions(run, questions)
    text = render_card(run, questions, run_evaluation(run, questions))
    assert "| model | exact match of the final answer | n |" in text
    assert '`answers.verifier = "final"` accepts with `final_pattern` `is (.*)`; texts' in text
