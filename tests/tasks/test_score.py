"""Scoring: each distinct text is judged once, ever; a judge that is away is asked again; failures are no scores."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from masters.common.errors import WorkerError
from masters.execution import processes
from masters.models.judging import worker
from masters.rewards import judge_prompts
from masters.store.artifacts import Artifact
from masters.tasks.judges import judge_of
from masters.tasks.run_context import Run
from tests import scoring_run as by_hand
from tests.fake_judge import FakeJudge, inside, serve, verdict
from tests.handmade_run import told
from tests.scoring_run import first_round, made_run, responses

QUESTIONS = {"q1": ("what color?", "teal"), "q2": ("what color?", "red"), "q3": ("is there a circle?", "yes")}
TEXTS = {"q1": ["teal", "Teal.", "red", "teal"], "q2": ["red", "red", "teal", ""], "q3": ["yes", "yes", "yes", "no"]}
DISTINCT = 3 + 3 + 2


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Children run here, one after the other: a process costs seconds of imports. A test may ask for real ones."""

    def run(children: list[processes.Child], at_once: int, on_progress, silence: float) -> processes.Ran:
        for child in children:
            child.folder.mkdir(parents=True, exist_ok=True)
            child.progress.unlink(missing_ok=True)
            child.job_file.write_text(json.dumps(child.job))
            worker.main(child.job_file)
            for line in child.progress.read_text().splitlines():
                on_progress(child.name, json.loads(line))
        return processes.Ran()

    if "real_process" not in request.fixturenames:
        monkeypatch.setattr(processes, "run", run)


@pytest.fixture
def real_process() -> None:
    """Asked for by a test whose judge is a process of its own."""


def scored(run: Run, texts: dict[str, list[str]] = TEXTS) -> tuple[Artifact, list[dict], dict]:
    return by_hand.scored(run, QUESTIONS, texts)


@pytest.fixture
def there() -> Iterator[FakeJudge]:
    with serve() as judge:
        yield judge


def down_for(text: str):
    """Says nothing but an error on one text."""
    return lambda user: (401, b"{}") if "<question>" in user and inside(user, "generated_text") == text else (
        200, verdict(user))  # fmt: skip


def test_rules_need_no_judge(tmp_path: Path) -> None:
    artifact, rows, line = scored(made_run(tmp_path, accuracy="rules"))
    assert [row["score"] for row in rows if row["question_id"] == "q1"] == [1, 1, 0, 1]
    assert {(row["judge"], row["status"]) for row in rows} == {("rules-1", "ok")}
    assert (artifact.facts["rows"], artifact.facts["rejected"], line["triples"]) == (12, 0, DISTINCT)
    assert artifact.files("judgements") == []


@pytest.mark.usefixtures("real_process")
def test_every_distinct_text_is_judged_once_and_its_verdict_shared(tmp_path: Path, there: FakeJudge) -> None:
    run = made_run(tmp_path, there.url)
    artifact, rows, line = scored(run)
    key = ("question_id", "source", "mask_ratio", "sample")
    given = {tuple(row[k] for k in key): row for row in responses(run, TEXTS).rows("responses")}
    assert {tuple(row[k] for k in key) for row in rows} == set(given)
    right = {"q1": [1, 1, 0, 1], "q2": [1, 1, 0, 0], "q3": [1, 1, 1, 0]}
    for row in rows:
        assert row["score"] == right[row["question_id"]][row["sample"]]
        assert row["explanation"] == f"It compares.\n<answer>{row['score']:.0f}</answer>"
    assert len(there.first_calls()) == len(set(there.first_calls())) == DISTINCT
    assert len(there.asked) == 2 * DISTINCT
    assert (line["triples"], line["asked"], line["answered"], line["rows"]) == (DISTINCT, DISTINCT, DISTINCT, 12)
    judged = list(artifact.rows("judgements"))
    assert len({row["triple_digest"] for row in judged}) == DISTINCT
    assert all(row["reading"] == f"{row['score']:.0f}" for row in judged)


def test_scoring_the_same_again_asks_no_judge(tmp_path: Path, there: FakeJudge) -> None:
    first, *_ = scored(made_run(tmp_path, there.url))
    asked = len(there.asked)
    again, _, line = scored(made_run(tmp_path, there.url))
    assert (again.fingerprint, line["outcome"], len(there.asked)) == (first.fingerprint, "reused", asked)


def test_new_rows_ask_only_about_what_is_new(tmp_path: Path, there: FakeJudge) -> None:
    first, before, _ = scored(made_run(tmp_path, there.url))
    there.asked.clear()
    more = TEXTS | {"q3": [*TEXTS["q3"], "No!"]}
    second, after, line = scored(made_run(tmp_path, there.url), more)
    assert second.fingerprint != first.fingerprint
    assert [inside(user, "generated_text") for user in there.first_calls()] == ["No!"]
    assert line["asked"] == 1
    assert [row for row in after if row["sample"] < 4] == before


def test_another_judge_or_other_prompts_judge_anew(tmp_path: Path, there: FakeJudge, monkeypatch) -> None:
    first, *_ = scored(made_run(tmp_path, there.url))
    monkeypatch.setattr(judge_prompts, "VERSION", judge_prompts.VERSION + 1)
    second, *_ = scored(made_run(tmp_path, there.url))
    with serve() as other:
        third, *_ = scored(made_run(tmp_path, other.url))
    assert len({artifact.fingerprint for artifact in (first, second, third)}) == 3
    assert (len(there.first_calls()), len(other.first_calls())) == (2 * DISTINCT, DISTINCT)


def test_rebuilding_asks_again(tmp_path: Path, there: FakeJudge) -> None:
    first, *_ = scored(made_run(tmp_path, there.url))
    again, *_ = scored(made_run(tmp_path, there.url, rebuild=True))
    assert again.fingerprint == first.fingerprint
    assert len(there.first_calls()) == 2 * DISTINCT


def test_a_failure_is_no_score_and_the_next_run_asks_again(tmp_path: Path, there: FakeJudge, capsys) -> None:
    there.say = down_for("Teal.")
    first, rows, line = scored(made_run(tmp_path, there.url))
    (failed,) = [row for row in rows if row["status"] != "ok"]
    assert (failed["question_id"], failed["sample"]) == ("q1", 1)
    assert (failed["score"], failed["status"]) == (None, "judge_failed")
    assert "HTTP 401" in failed["explanation"]
    assert (first.facts["statuses"], first.facts["rejected"]) == ({"ok": 11, "judge_failed": 1}, 1)
    assert (line["asked"], line["answered"]) == (DISTINCT, DISTINCT - 1)
    assert line["no_verdict"] == {"judge_failed": 1}
    assert "1 of 12 responses have no verdict and get no reward (judge_failed 1)" in told(capsys)

    there.say = lambda user: (200, verdict(user))
    there.asked.clear()
    second, rows, line = scored(made_run(tmp_path, there.url))
    assert [inside(user, "generated_text") for user in there.first_calls()] == ["Teal."]
    assert {row["status"] for row in rows} == {"ok"}
    assert second.fingerprint != first.fingerprint  # what was trained on the first one's verdicts stays true
    assert second.record["inputs"]["earlier"] == first.fingerprint

    there.asked.clear()
    third, _, line = scored(made_run(tmp_path, there.url))
    assert (third.fingerprint, line["outcome"], there.asked) == (second.fingerprint, "reused", [])


def test_while_it_stays_away_what_there_is_stays(tmp_path: Path, there: FakeJudge) -> None:
    there.say = down_for("Teal.")
    first, *_ = scored(made_run(tmp_path, there.url))
    again, _, line = scored(made_run(tmp_path, there.url))
    assert (again.fingerprint, line["outcome"]) == (first.fingerprint, "reused")


def test_a_text_that_the_judge_refuses_is_final_in_its_artifact(tmp_path: Path, there: FakeJudge, capsys) -> None:
    there.say = lambda user: (400, b"{}") if "Teal." in user else (200, verdict(user))
    first, rows, _ = scored(made_run(tmp_path, there.url))
    assert [row["status"] for row in rows if row["score"] is None] == ["refused"]
    assert "1 of 12 responses have no verdict and get no reward (refused 1)" in told(capsys)
    again, _, line = scored(made_run(tmp_path, there.url))
    assert (again.fingerprint, line["outcome"], line["no_verdict"]) == (first.fingerprint, "reused", {"refused": 1})
    assert "(refused 1)" in told(capsys)  # of what is reused, too


def test_where_every_verdict_is_there_nothing_is_said_of_it(tmp_path: Path, there: FakeJudge, capsys) -> None:
    _, _, line = scored(made_run(tmp_path, there.url))
    assert "no_verdict" not in line and "verdict" not in told(capsys)


@pytest.mark.parametrize(
    ("reply", "says"), [((401, b"{}"), r"judge_failed 8\); first it said: 'HTTP 401"), ((200, "?"), "parse_failed 8")]
)
def test_no_verdict_at_all_ends_the_stage(tmp_path: Path, there: FakeJudge, reply: tuple, says: str) -> None:
    there.say = lambda _: reply
    with pytest.raises(WorkerError, match=rf"judge {there.url} gave no verdict on any of 8 texts.*{says}"):
        scored(made_run(tmp_path, there.url))
    assert made_run(tmp_path).storage.children("score") == []


def test_the_teacher_judges_where_no_other_is_named(tmp_path: Path) -> None:
    run = made_run(tmp_path, judge="teacher")
    current = first_round(run)
    larger = replace(current, number=2, teacher=replace(current.teacher, digest="0" * 64))
    judge, later = judge_of(run, current), judge_of(run, larger)
    assert judge is not None and later is not None
    assert (judge.name, judge.model["digest"]) == ("t", run.ready.teachers[0].digest)
    assert later.identity != judge.identity
