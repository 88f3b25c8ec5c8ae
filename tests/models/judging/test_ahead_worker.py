"""A judge behind a URL works while engines do: score finds its verdicts, and asks itself for what is missing."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from masters.execution import processes
from masters.models.generation import shards as answering
from masters.models.judging import batches
from masters.store.artifacts import Identity
from masters.tasks.generate import _judge_beside
from masters.tasks.judges import judge_of
from masters.tasks.run_context import Run
from tests import scoring_run as by_hand
from tests.fake_judge import FakeJudge, serve
from tests.scoring_run import first_round, made_run, question_table, responses

QUESTIONS = {"q1": ("what color?", "teal"), "q2": ("what color?", "red"), "q3": ("is there a circle?", "yes")}
TEXTS = {"q1": ["teal", "red", "teal"], "q2": ["red", "teal", ""], "q3": ["yes", "yes", "no"]}
DISTINCT = 2 + 3 + 2


@pytest.fixture
def there() -> Iterator[FakeJudge]:
    with serve() as judge:
        yield judge


def shards(run: Run) -> dict[str, bytes]:
    """Each question's responses, as engines leave them: name to content."""
    table = responses(run, TEXTS)
    return {f"shards/responses/{name.rsplit('/', 1)[1]}": table.storage.read(name) for name in table.files("responses")}


def child(run: Run, names: list[str], folder: Path) -> processes.Child:
    judge = judge_of(run, first_round(run))
    assert judge is not None
    made = batches.start_early_judging(question_table(run, QUESTIONS), judge, names, run.config.runtime, folder)
    assert made is not None
    return made


def judged(run: Run, folder: Path) -> list[dict]:
    """What a real process says that it did, while shards come one after the other."""
    coming, said = shards(run), []
    first, *late = sorted(coming)
    run.storage.write(first, coming[first])

    def hear(_: str, line: dict) -> None:
        said.append(line)
        if late and line["event"] == "waiting" and sum("judged" in one for one in said):
            run.storage.write(name := late.pop(0), coming[name])

    processes.run([child(run, list(coming), folder)], 1, hear, 60)
    return said


def test_shards_are_judged_as_they_come_and_score_asks_nobody(tmp_path: Path, there: FakeJudge) -> None:
    run = made_run(tmp_path / "store", there.url)
    assert sum(line.get("judged", 0) for line in judged(run, tmp_path / "work")) == DISTINCT
    assert len(there.first_calls()) == len(set(there.first_calls())) == DISTINCT
    there.asked.clear()
    artifact, rows, line = by_hand.scored(run, QUESTIONS, TEXTS)
    assert (there.asked, line["asked"], artifact.facts["statuses"]) == ([], 0, {"ok": 9})
    with serve() as fresh:
        _, plain, _ = by_hand.scored(made_run(tmp_path / "plain", fresh.url), QUESTIONS, TEXTS)
    told = ("question_id", "sample", "score", "status", "explanation")
    assert [[row[k] for k in told] for row in rows] == [[row[k] for k in told] for row in plain]


def test_a_judge_that_is_down_ends_nothing_and_score_says_so(tmp_path: Path, there: FakeJudge) -> None:
    there.say = lambda _: (401, b"{}")
    run = made_run(tmp_path / "store", there.url)
    for name, data in shards(run).items():
        run.storage.write(name, data)
    job = child(run, list(shards(run)), tmp_path / "work")
    processes.run([job], 1, lambda *_: None, 60)
    assert "score will ask again" in job.log.read_text()
    there.say = FakeJudge().say
    _, rows, line = by_hand.scored(run, QUESTIONS, TEXTS)
    assert line["asked"] == DISTINCT and {row["status"] for row in rows} == {"ok"}


def test_engines_of_a_run_have_it_beside_them_only_where_it_helps(tmp_path: Path, monkeypatch) -> None:
    """Not without a judge, nor for one that needs an engine of its own, nor where its verdicts are to be forgotten."""

    def beside(run: Run) -> processes.Child | None:
        data = question_table(run, QUESTIONS)
        return _judge_beside(run, first_round(run), Identity("generate", 1, {}, {}), data, [])

    assert beside(made_run(tmp_path / "a")) is not None
    assert beside(made_run(tmp_path / "b", accuracy="rules")) is None
    assert beside(made_run(tmp_path / "c", rebuild=True)) is None
    monkeypatch.setattr("masters.tasks.generate.judge_of", lambda *_: batches.Judge("own", {}, {"folder": "x"}))
    assert beside(made_run(tmp_path / "d")) is None


def test_nothing_is_started_for_shards_that_are_there(tmp_path: Path, there: FakeJudge) -> None:
    run = made_run(tmp_path / "store", there.url)
    job = child(run, [], tmp_path / "work")
    how = answering.run_generation(
        question_table(run, QUESTIONS), [], run.config.runtime, tmp_path, lambda *_: None, job
    )
    assert how["engines"] == how["judged_ahead"] == 0
    assert not job.job_file.exists()
