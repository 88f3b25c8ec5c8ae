"""A judge server works while engines generate: score finds its verdicts, and asks for the missing ones itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from masters.execution import processes
from masters.execution.events import EngineEvent, JudgedEarly, WaitingForShards, parse_event
from masters.models.generation import shards as generation
from masters.models.judging import batches
from masters.models.judging.job import EngineEndpoint
from masters.store.artifacts import Identity
from masters.tasks.generate import _early_judging
from masters.tasks.judges import scoring_judge
from masters.tasks.run_context import Run
from tests import scoring_run as by_hand
from tests.fake_judge import FakeJudge, serve
from tests.scoring_run import first_round, make_run, write_question_table, write_responses

QUESTIONS = {"q1": ("what color?", "teal"), "q2": ("what color?", "red"), "q3": ("is there a circle?", "yes")}
TEXTS = {"q1": ["teal", "red", "teal"], "q2": ["red", "teal", ""], "q3": ["yes", "yes", "no"]}
DISTINCT = 2 + 3 + 2
ENGINE_JUDGE = batches.Judge("m", {}, EngineEndpoint(folder=Path("m"), dtype="float32", trust_remote_code=False))


@pytest.fixture
def server() -> Iterator[FakeJudge]:
    with serve() as judge:
        yield judge


def encode_shards(run: Run) -> dict[str, bytes]:
    """The shards of each question's responses as engines write them: name to content."""
    table = write_responses(run, TEXTS)
    return {f"shards/responses/{name.rsplit('/', 1)[1]}": table.storage.read(name) for name in table.files("responses")}


def make_child(run: Run, names: list[str], folder: Path) -> processes.Child:
    judge = scoring_judge(run, first_round(run))
    assert judge is not None
    child = batches.start_early_judging(write_question_table(run, QUESTIONS), judge, names, run.config.runtime, folder)
    assert child is not None
    return child


def judge_early(run: Run, folder: Path) -> int:
    """Run a real process while shards appear one after the other. Returns the number of triples that it judged."""
    shards = encode_shards(run)
    events: list[EngineEvent] = []
    first, *late = sorted(shards)
    run.storage.write(first, shards[first])

    def add_next_shard(_: str, line: dict) -> None:
        events.append(event := parse_event(line))
        if late and isinstance(event, WaitingForShards) and any(isinstance(e, JudgedEarly) for e in events):
            run.storage.write(name := late.pop(0), shards[name])

    processes.run([make_child(run, list(shards), folder)], 1, add_next_shard, 300)
    return sum(event.judged for event in events if isinstance(event, JudgedEarly))


def test_shards_are_judged_as_they_appear_and_score_asks_for_nothing(tmp_path: Path, server: FakeJudge) -> None:
    run = make_run(tmp_path / "store", server.url)
    assert judge_early(run, tmp_path / "work") == DISTINCT
    assert len(server.first_calls()) == len(set(server.first_calls())) == DISTINCT
    server.requests.clear()
    artifact, rows, line = by_hand.run_scoring(run, QUESTIONS, TEXTS)
    assert (server.requests, line["asked"], artifact.facts["statuses"]) == ([], 0, {"ok": 9})
    with serve() as fresh:
        _, plain, _ = by_hand.run_scoring(make_run(tmp_path / "plain", fresh.url), QUESTIONS, TEXTS)
    columns = ("question_id", "sample", "score", "status", "explanation")
    assert [[row[k] for k in columns] for row in rows] == [[row[k] for k in columns] for row in plain]


def test_a_judge_that_is_down_stops_no_run_and_score_asks_again(tmp_path: Path, server: FakeJudge) -> None:
    server.reply = lambda _: (401, b"{}")
    run = make_run(tmp_path / "store", server.url)
    for name, data in encode_shards(run).items():
        run.storage.write(name, data)
    child = make_child(run, list(encode_shards(run)), tmp_path / "work")
    processes.run([child], 1, lambda *_: None, 300)
    assert "score will ask again" in child.log.read_text()
    server.reply = FakeJudge().reply
    _, rows, line = by_hand.run_scoring(run, QUESTIONS, TEXTS)
    assert line["asked"] == DISTINCT and {row["status"] for row in rows} == {"ok"}


def test_a_judge_works_early_only_where_that_helps(tmp_path: Path, monkeypatch) -> None:
    """Not without a judge, not with a judge in an engine, and not where its verdicts are to be deleted."""

    def start(run: Run) -> processes.Child | None:
        data = write_question_table(run, QUESTIONS)
        return _early_judging(run, first_round(run), Identity("generate", 1, {}, {}), data, [])

    assert start(make_run(tmp_path / "a")) is not None
    assert start(make_run(tmp_path / "b", accuracy="rules")) is None
    assert start(make_run(tmp_path / "c", rebuild=True)) is None
    monkeypatch.setattr("masters.tasks.generate.scoring_judge", lambda *_: ENGINE_JUDGE)
    assert start(make_run(tmp_path / "d")) is None


def test_no_process_starts_for_shards_that_are_in_the_store(tmp_path: Path, server: FakeJudge) -> None:
    run = make_run(tmp_path / "store", server.url)
    child = make_child(run, [], tmp_path / "work")
    statistics = generation.run_generation(
        write_question_table(run, QUESTIONS), [], run.config.runtime, tmp_path, lambda *_: None, child
    )
    assert statistics["engines"] == statistics["judged_ahead"] == 0
    assert not child.job_file.exists()
