"""A judge's server is asked a question before the work that it will judge, once in a run."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from masters.common.errors import InputError, Unreachable
from masters.config.stages import Stage
from masters.flows.distill import ask_judge_if_needed
from masters.models.judging.job import ServerEndpoint
from masters.rewards import judge_server
from masters.rewards.judge_request import RequestStyle
from masters.tasks import generate
from masters.tasks.data import data
from masters.tasks.judges import ask_judge_first, is_judged_by_server, scoring_judge
from masters.tasks.mask import mask
from tests import handmade_run, scoring_run
from tests.fake_judge import FakeJudge, judge_by_exact_match, serve
from tests.handmade_run import read_stderr
from tests.judge_modes import DECORATED, PARAMETERS, THINKING, UNREADABLE
from tests.scoring_run import first_round
from tests.shape_data import write_questions


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJudge]:
    monkeypatch.setattr(judge_server, "MAX_RETRIES", 0)
    with serve() as server:
        yield server


def test_parameters_are_found_once_in_a_run(tmp_path: Path, judge: FakeJudge) -> None:
    judge.respond = PARAMETERS["only max_completion_tokens and temperature 1"].respond
    run = scoring_run.make_run(tmp_path, judge.url)
    ask_judge_first(run)
    asked = len(judge.requests)
    ask_judge_first(run)
    assert len(judge.requests) == asked
    style = RequestStyle(token_parameter="max_completion_tokens", temperature=False)
    made = scoring_judge(run, first_round(run))
    assert made and isinstance(made.endpoint, ServerEndpoint) and made.endpoint.style == style


@pytest.mark.parametrize("name", DECORATED)
def test_a_judge_that_decorates_its_verdict_passes(tmp_path: Path, judge: FakeJudge, name: str) -> None:
    judge.respond = DECORATED[name].respond
    ask_judge_first(scoring_run.make_run(tmp_path, judge.url))


@pytest.mark.parametrize("name", [*THINKING, *UNREADABLE])
def test_a_judge_without_a_verdict_is_refused(tmp_path: Path, judge: FakeJudge, name: str) -> None:
    judge.respond = {**THINKING, **UNREADABLE}[name].respond
    with pytest.raises(InputError, match="gave no verdict on a test question") as error:
        ask_judge_first(scoring_run.make_run(tmp_path, judge.url))
    assert "\n" not in str(error.value)
    assert ("rewards.judge_tokens" in str(error.value)) == (name in THINKING)
    if name in THINKING:
        ask_judge_first(scoring_run.make_run(tmp_path, judge.url, judge_tokens=1024))


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_judge_is_only_warned_of(tmp_path: Path, judge: FakeJudge, status: int, capsys) -> None:
    judge.reply = lambda _: (status, b"{}")
    run = scoring_run.make_run(tmp_path, judge.url)
    ask_judge_first(run)
    assert f"did not answer a test question (HTTP {status}" in read_stderr(capsys) and run.judge_style is None
    judge.reply = lambda user: (200, judge_by_exact_match(user))
    ask_judge_first(run)
    assert run.judge_style is not None


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, b"{}", "set its key in MASTERS_JUDGE_API_KEY"), (403, b"{}", "set its key in MASTERS_JUDGE_API_KEY"),
        (404, b"{}", "correct rewards.judge"), (404, b'{"error": {"message": "HTTP 401"}}', "correct rewards.judge"),
    ],
)  # fmt: skip
def test_a_judge_that_refuses_the_client_is_an_error_with_the_remedy(
    tmp_path: Path, judge: FakeJudge, status: int, body: bytes, says: str
) -> None:
    judge.reply = lambda _: (status, body)
    with pytest.raises(Unreachable, match=f"does not answer .HTTP {status}.*{says}"):
        ask_judge_first(scoring_run.make_run(tmp_path, judge.url))


def test_a_judge_that_is_not_there_is_refused(tmp_path: Path, judge: FakeJudge) -> None:
    with pytest.raises(Unreachable, match="does not answer .*start its server, or correct rewards.judge"):
        ask_judge_first(scoring_run.make_run(tmp_path, "http://127.0.0.1:9/v1"))


def test_a_judge_that_takes_right_for_wrong_is_warned_of(tmp_path: Path, judge: FakeJudge, capsys) -> None:
    judge.reply = lambda user: (200, "0" if "<overall_summary>" in user else "No. <answer>0</answer>")
    ask_judge_first(scoring_run.make_run(tmp_path, judge.url))
    assert "scores a right answer to a test question 0" in read_stderr(capsys)


def test_only_a_run_that_sends_texts_asks(tmp_path: Path, judge: FakeJudge) -> None:
    server = scoring_run.make_run(tmp_path / "a", judge.url)
    assert is_judged_by_server(server, {Stage.SCORE}) and not is_judged_by_server(server, {Stage.GENERATE})
    assert not is_judged_by_server(scoring_run.make_run(tmp_path / "b", accuracy="rules"), {Stage.SCORE})
    assert not is_judged_by_server(scoring_run.make_run(tmp_path / "c", judge="teacher"), {Stage.SCORE})
    on_a_pool = scoring_run.make_run(tmp_path / "d", judge.url, pools=dict(cpu="cpu"))
    assert not is_judged_by_server(on_a_pool, {Stage.SCORE})  # another machine may have the key


def test_a_judge_without_a_verdict_costs_no_generation(tmp_path: Path, judge: FakeJudge) -> None:
    judge.respond = UNREADABLE["refuses all"].respond
    source = write_questions(tmp_path / "source", 8, bad=False)
    run = handmade_run.make_run(tmp_path / "store", source, rewards=dict(accuracy="llm", judge=judge.url))
    current, questions = handmade_run.first_round(run), data.fn(run)
    masks = mask.fn(run, current)
    with pytest.raises(InputError, match="this account may not use this model"):
        generate.generate.fn(
            run, current, questions, masks, (), partial(ask_judge_if_needed, run, {Stage.GENERATE, Stage.SCORE})
        )
    assert not list((tmp_path / "store").rglob("*.log")) and not run.storage.names("shards")
    judge.requests.clear()
    ask_judge_if_needed(run, {Stage.GENERATE})  # `masters stage generate` ends before the judge is needed
    assert judge.requests == []
