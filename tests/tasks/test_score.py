"""Scoring: each distinct text is judged once; an unavailable judge is asked again; a failure has no score."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from masters.common.errors import ArtifactError, WorkerError
from masters.execution import processes
from masters.models.judging import worker
from masters.rewards import judge_prompts
from masters.store.artifacts import Artifact
from masters.tasks.judges import scoring_judge
from masters.tasks.run_context import Run
from tests.fake_judge import FakeJudge, judge_by_exact_match, serve, tag_content
from tests.handmade_run import read_stderr
from tests.judge_modes import THINKING, UNREADABLE
from tests.scoring_run import first_round, make_run, run_scoring, write_responses

QUESTIONS = {"q1": ("what color?", "teal"), "q2": ("what color?", "red"), "q3": ("is there a circle?", "yes")}
TEXTS = {"q1": ["teal", "Teal.", "red", "teal"], "q2": ["red", "red", "teal", ""], "q3": ["yes", "yes", "yes", "no"]}
DISTINCT = 3 + 3 + 2


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Run child processes in this process, as imports take seconds, unless a test uses the fixture `real_process`."""

    def run(
        children: list[processes.Child], max_running: int, on_progress, heartbeat_timeout: float
    ) -> processes.ProcessUsage:
        for child in children:
            child.write_job()
            worker.main(child.job_file)
            for entry in child.progress.read_text().splitlines():
                on_progress(child.name, json.loads(entry))
        return processes.ProcessUsage()

    if "real_process" not in request.fixturenames:
        monkeypatch.setattr(processes, "run", run)


@pytest.fixture
def real_process() -> None:
    """Run child processes as real processes."""


def score_texts(run: Run, texts: dict[str, list[str]] = TEXTS) -> tuple[Artifact, list[dict], dict]:
    return run_scoring(run, QUESTIONS, texts)


@pytest.fixture
def fake_judge() -> Iterator[FakeJudge]:
    with serve() as judge:
        yield judge


def fail_on(text: str):
    """Return a reply function that answers one text with an error."""
    return lambda user: (401, b"{}") if "<question>" in user and tag_content(user, "generated_text") == text else (
        200, judge_by_exact_match(user))  # fmt: skip


def test_rules_score_without_a_judge(tmp_path: Path) -> None:
    artifact, rows, entry = score_texts(make_run(tmp_path, accuracy="rules"))
    assert [row["score"] for row in rows if row["question_id"] == "q1"] == [1, 1, 0, 1]
    assert {(row["judge"], row["status"]) for row in rows} == {("rules-1", "ok")}
    assert (artifact.facts["rows"], artifact.facts["rejected"], entry["triples"]) == (12, 0, DISTINCT)
    assert artifact.files("judgements") == []


@pytest.mark.usefixtures("real_process")
def test_every_distinct_text_is_judged_once(tmp_path: Path, fake_judge: FakeJudge) -> None:
    run = make_run(tmp_path, fake_judge.url)
    artifact, rows, entry = score_texts(run)
    key = ("question_id", "source", "mask_ratio", "sample")
    given = {tuple(row[k] for k in key): row for row in write_responses(run, TEXTS).rows("responses")}
    assert {tuple(row[k] for k in key) for row in rows} == set(given)
    right = {"q1": [1, 1, 0, 1], "q2": [1, 1, 0, 0], "q3": [1, 1, 1, 0]}
    for row in rows:
        assert row["score"] == right[row["question_id"]][row["sample"]]
        assert row["explanation"] == f"It compares.\n<answer>{row['score']:.0f}</answer>"
    assert len(fake_judge.first_calls()) == len(set(fake_judge.first_calls())) == DISTINCT
    assert len(fake_judge.requests) == 2 * DISTINCT
    assert (entry["triples"], entry["asked"], entry["answered"], entry["rows"]) == (DISTINCT, DISTINCT, DISTINCT, 12)
    judged = list(artifact.rows("judgements"))
    assert len({row["triple_digest"] for row in judged}) == DISTINCT
    assert all(row["reading"] == f"{row['score']:.0f}" for row in judged)


def test_scoring_again_makes_no_judge_requests(tmp_path: Path, fake_judge: FakeJudge) -> None:
    first, *_ = score_texts(make_run(tmp_path, fake_judge.url))
    requests = len(fake_judge.requests)
    again, _, entry = score_texts(make_run(tmp_path, fake_judge.url))
    assert (again.fingerprint, entry["outcome"], len(fake_judge.requests)) == (first.fingerprint, "reused", requests)


def test_only_new_texts_are_judged(tmp_path: Path, fake_judge: FakeJudge) -> None:
    first, before, _ = score_texts(make_run(tmp_path, fake_judge.url))
    fake_judge.requests.clear()
    more = TEXTS | {"q3": [*TEXTS["q3"], "No!"]}
    second, after, entry = score_texts(make_run(tmp_path, fake_judge.url), more)
    assert second.fingerprint != first.fingerprint
    assert [tag_content(user, "generated_text") for user in fake_judge.first_calls()] == ["No!"]
    assert entry["asked"] == 1
    assert [row for row in after if row["sample"] < 4] == before


def test_another_judge_or_other_prompts_judge_everything_again(
    tmp_path: Path, fake_judge: FakeJudge, monkeypatch
) -> None:
    first, *_ = score_texts(make_run(tmp_path, fake_judge.url))
    monkeypatch.setattr(judge_prompts, "VERSION", judge_prompts.VERSION + 1)
    second, *_ = score_texts(make_run(tmp_path, fake_judge.url))
    with serve() as other:
        third, *_ = score_texts(make_run(tmp_path, other.url))
    assert len({artifact.fingerprint for artifact in (first, second, third)}) == 3
    assert (len(fake_judge.first_calls()), len(other.first_calls())) == (2 * DISTINCT, DISTINCT)


def test_rebuild_judges_again(tmp_path: Path, fake_judge: FakeJudge) -> None:
    first, *_ = score_texts(make_run(tmp_path, fake_judge.url))
    again, *_ = score_texts(make_run(tmp_path, fake_judge.url, rebuild=True))
    assert again.fingerprint == first.fingerprint
    assert len(fake_judge.first_calls()) == 2 * DISTINCT


@pytest.mark.parametrize("file", ["record.json", "verdicts"])
def test_a_damaged_pass_is_an_error_until_it_is_rebuilt(tmp_path: Path, file: str) -> None:
    built, rows, _ = score_texts(make_run(tmp_path, accuracy="rules"))
    name = built.files("verdicts")[0] if file == "verdicts" else f"{built.folder}/{file}"
    built.storage.write(name, built.storage.read(name)[:-20])
    with pytest.raises(ArtifactError, match=r"rebuild it with --rebuild score"):
        score_texts(make_run(tmp_path, accuracy="rules"))
    assert score_texts(make_run(tmp_path, accuracy="rules", rebuild=True))[1] == rows


def test_failed_judgement_has_no_score_and_is_repeated_by_the_next_run(
    tmp_path: Path, fake_judge: FakeJudge, capsys
) -> None:
    fake_judge.reply = fail_on("Teal.")
    first, rows, entry = score_texts(make_run(tmp_path, fake_judge.url))
    (failed,) = [row for row in rows if row["status"] != "ok"]
    assert (failed["question_id"], failed["sample"]) == ("q1", 1)
    assert (failed["score"], failed["status"]) == (None, "judge_failed")
    assert "HTTP 401" in failed["explanation"]
    assert (first.facts["statuses"], first.facts["rejected"]) == ({"ok": 11, "judge_failed": 1}, 1)
    assert (entry["asked"], entry["answered"]) == (DISTINCT, DISTINCT - 1)
    assert entry["no_verdict"] == {"judge_failed": 1}
    assert "1 of 12 responses have no verdict and get no reward (judge_failed 1)" in read_stderr(capsys)

    fake_judge.reply = lambda user: (200, judge_by_exact_match(user))
    fake_judge.requests.clear()
    second, rows, entry = score_texts(make_run(tmp_path, fake_judge.url))
    assert [tag_content(user, "generated_text") for user in fake_judge.first_calls()] == ["Teal."]
    assert {row["status"] for row in rows} == {"ok"}
    assert second.fingerprint != first.fingerprint  # what was trained on the first one's verdicts stays true
    assert second.record["inputs"]["earlier"] == first.fingerprint

    fake_judge.requests.clear()
    third, _, entry = score_texts(make_run(tmp_path, fake_judge.url))
    assert (third.fingerprint, entry["outcome"], fake_judge.requests) == (second.fingerprint, "reused", [])


def test_pass_with_gaps_is_kept_while_the_judge_is_unavailable(tmp_path: Path, fake_judge: FakeJudge) -> None:
    fake_judge.reply = fail_on("Teal.")
    first, *_ = score_texts(make_run(tmp_path, fake_judge.url))
    again, _, entry = score_texts(make_run(tmp_path, fake_judge.url))
    assert (again.fingerprint, entry["outcome"]) == (first.fingerprint, "reused")


def test_refused_text_is_final(tmp_path: Path, fake_judge: FakeJudge, capsys) -> None:
    fake_judge.reply = lambda user: (400, b"{}") if "Teal." in user else (200, judge_by_exact_match(user))
    first, rows, _ = score_texts(make_run(tmp_path, fake_judge.url))
    assert [row["status"] for row in rows if row["score"] is None] == ["refused"]
    assert "1 of 12 responses have no verdict and get no reward (refused 1)" in read_stderr(capsys)
    again, _, entry = score_texts(make_run(tmp_path, fake_judge.url))
    assert (again.fingerprint, entry["outcome"], entry["no_verdict"]) == (first.fingerprint, "reused", {"refused": 1})
    assert "(refused 1)" in read_stderr(capsys)  # for a reused artifact too


def test_no_warning_if_every_response_has_a_verdict(tmp_path: Path, fake_judge: FakeJudge, capsys) -> None:
    _, _, entry = score_texts(make_run(tmp_path, fake_judge.url))
    assert "no_verdict" not in entry and "verdict" not in read_stderr(capsys)


@pytest.mark.parametrize(
    ("reply", "says"), [((401, b"{}"), r"judge_failed 8\); its first reply: 'HTTP 401"), ((200, "?"), "parse_failed 8")]
)
def test_stage_fails_without_any_verdict(tmp_path: Path, fake_judge: FakeJudge, reply: tuple, says: str) -> None:
    fake_judge.reply = lambda _: reply
    with pytest.raises(WorkerError, match=rf"judge {fake_judge.url} gave no verdict on any of 8 texts.*{says}"):
        score_texts(make_run(tmp_path, fake_judge.url))
    assert make_run(tmp_path).storage.children("score") == []


MANY = {"q1": [f"teal {n}" for n in range(60)]}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("refuses all", "refused 20.*this account may not use this model"),
        ("long thoughts", r"parse_failed 20.*cut off at 256 and 8 tokens.*raise rewards\.judge_tokens"),
        ("long thoughts beside the content", "parse_failed 20.*cut off"),
        ("doubt", "parse_failed 20.*The score is not 0"),
    ],
)
def test_stage_stops_after_20_texts_without_a_verdict(
    tmp_path: Path, fake_judge: FakeJudge, name: str, says: str
) -> None:
    fake_judge.respond = {**THINKING, **UNREADABLE}[name].respond
    with pytest.raises(WorkerError, match=f"no verdict on any of the first 20 texts.*{says}"):
        score_texts(make_run(tmp_path, fake_judge.url), MANY)
    assert len({tag_content(user, "generated_text") for user in fake_judge.first_calls()}) == 20
    assert make_run(tmp_path).storage.names("shards/judgements") == []  # a repaired judge is asked about them again
    fake_judge.respond = None
    _, rows, _ = score_texts(make_run(tmp_path, fake_judge.url), MANY)
    assert {row["status"] for row in rows} == {"ok"}


def test_few_texts_without_a_verdict_are_judged_again_too(tmp_path: Path, fake_judge: FakeJudge) -> None:
    fake_judge.respond = UNREADABLE["no tag"].respond
    with pytest.raises(WorkerError, match="gave no verdict on any of 8 texts"):
        score_texts(make_run(tmp_path, fake_judge.url))
    fake_judge.respond = None
    _, rows, _ = score_texts(make_run(tmp_path, fake_judge.url))
    assert {row["status"] for row in rows} == {"ok"}


def test_a_judge_that_is_unavailable_at_first_is_asked_about_all_texts(tmp_path: Path, fake_judge: FakeJudge) -> None:
    failures = [(401, b"{}")] * 25
    fake_judge.reply = lambda user: failures.pop() if failures else (200, judge_by_exact_match(user))
    artifact, _, _ = score_texts(make_run(tmp_path, fake_judge.url), MANY)
    assert artifact.facts["statuses"] == {"judge_failed": 25, "ok": 35}


def test_a_judge_that_thinks_judges_with_room(tmp_path: Path, fake_judge: FakeJudge) -> None:
    fake_judge.respond = THINKING["long thoughts"].respond
    run = make_run(tmp_path, fake_judge.url, judge_tokens=1024)
    _, rows, _ = score_texts(run)
    assert {row["status"] for row in rows} == {"ok"}
    assert {call["max_tokens"] for call in fake_judge.requests} == {1024}
    judge = scoring_judge(run, first_round(run))
    assert judge and judge.identity["sampling"]["max_tokens"] == {"explanation": 1024, "score": 1024}


def test_identity_of_an_engine_judge_is_that_of_committed_studies(tmp_path: Path) -> None:
    run = make_run(tmp_path, judge="teacher")
    judge = scoring_judge(run, first_round(run))
    sampling = dict(temperature=0, max_tokens=dict(explanation=256, score=8))
    model = dict(digest=run.resources.teachers[0].digest, dtype="float32")
    assert judge and judge.identity == dict(version=1, prompts=1, sampling=sampling, model=model)


def test_teacher_judges_if_no_other_judge_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, judge="teacher")
    current = first_round(run)
    larger = replace(current, number=2, teacher=replace(current.teacher, digest="0" * 64))
    judge, later = scoring_judge(run, current), scoring_judge(run, larger)
    assert judge is not None and later is not None
    assert (judge.name, judge.model["digest"]) == ("t", run.resources.teachers[0].digest)
    assert later.identity != judge.identity
