"""Score and evaluate by a verifier, on questions with several accepted answers; what models say is written by hand."""

import json
from pathlib import Path

import pytest

from masters.models.generation import shards
from masters.store import tables
from masters.store.artifacts import Artifact
from masters.tasks import evaluate
from masters.tasks.data import data
from masters.tasks.register import card
from masters.tasks.run_context import Run
from masters.tasks.score import score
from tests.handmade_run import first_round, made_run, write_table
from tests.shape_data import write_questions, write_rows

ACCEPTED = ["4 + 0 + 7 = 11", "eleven"]
SAID = {"11": 1.0, "So the answer is Eleven.": 1.0, "4 + 0 + 7 = 11": 1.0, "12": 0.0, "4 + 0 + 7 = 12": 0.0, "": 0.0}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    rows = [json.loads(line) for line in write_questions(folder, 12, bad=False).read_text().splitlines()]
    return write_rows(folder, [row | dict(answer=ACCEPTED) for row in rows])


def responses(run: Run, questions: Artifact) -> Artifact:
    """Each question is answered in every way of `SAID`."""
    ids = [
        row["question_id"] for row in questions.rows("questions", ["question_id", "split"]) if row["split"] == "train"
    ]
    rows = [
        dict(question_id=question, source="teacher", mask_ratio=0.2, sample=sample, model="t", text=text)
        for question in ids
        for sample, text in enumerate(SAID)
    ]
    return write_table(run, "responses", rows, tables.RESPONSES)


def predicted(run: Run, questions: Artifact) -> None:
    """The shards that `evaluate` asks of the student, as if an engine had answered in one word."""
    for order in evaluate.orders(run, questions, [run.ready.student]):
        rows = [
            dict(question_id=ref.question_id, model=order.answerer.name, text="11", finish_reason="stop")
            for ref in order.shard.refs
        ]
        run.storage.create(order.file, tables.encode(rows, tables.PREDICTED))


def evaluated(run: Run, questions: Artifact) -> Artifact:
    return evaluate.evaluate.fn(run, questions, [run.ready.student])


def test_score_accepts_what_the_verifier_accepts_of_any_accepted_answer(tmp_path: Path, source: Path) -> None:
    found = {}
    for verifier in ("final", "exact"):
        run = made_run(tmp_path / "store", source, answers=dict(verifier=verifier))
        questions = data.fn(run)
        rows = score.fn(run, first_round(run), questions, responses(run, questions)).rows("verdicts")
        found[verifier] = [(list(SAID)[row["sample"]], row["score"], row["judge"]) for row in rows]
    assert set(found["final"]) == {(text, right, "final-1") for text, right in SAID.items()}
    assert len(found["final"]) == 9 * len(SAID)
    assert {text for text, right, _ in found["exact"] if right} == {"4 + 0 + 7 = 11"}


def test_another_verifier_evaluates_what_was_answered_without_an_engine(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_work", lambda *_: pytest.fail("an engine was asked"))
    runs = {v: made_run(tmp_path / "store", source, answers=dict(verifier=v)) for v in ("final", "exact", "number")}
    questions = data.fn(runs["final"])
    predicted(runs["final"], questions)
    made = {verifier: evaluated(run, questions) for verifier, run in runs.items()}
    assert len({artifact.fingerprint for artifact in made.values()}) == 3
    for verifier, right in dict(final=True, exact=False, number=True).items():
        table = tables.read(runs[verifier].storage, made[verifier].files("predictions")[0])
        assert table.schema.equals(tables.PREDICTIONS)
        assert {(row["text"], row["correct"]) for row in made[verifier].rows("predictions")} == {("11", right)}
        (counted,) = made[verifier].facts["scores"].values()
        assert (counted["accuracy"], counted["n"]) == (float(right), 3)


def test_the_model_card_names_the_verifier(tmp_path: Path, source: Path) -> None:
    run = made_run(tmp_path / "store", source, answers=dict(verifier="final", final_pattern="is (.*)"))
    questions = data.fn(run)
    predicted(run, questions)
    text = card(run, questions, evaluated(run, questions))
    assert "| model | exact match of the final answer | n |" in text
    assert '`answers.verifier = "final"` accepts with `final_pattern` `is (.*)`; texts' in text
