"""A judge behind a URL: retries, time-outs, final and temporary failures, bounded concurrency."""

from collections.abc import Callable

import pytest

from masters.common.errors import InputError
from masters.config.judge_url import api_base_url
from masters.rewards import judge_server
from masters.rewards.judge import judge_triples
from masters.rewards.judge_prompts import TokenLimits, grading_conversation
from masters.rewards.judge_request import STYLES
from masters.rewards.judge_server import ServerJudge
from masters.rewards.verdict import Triple
from tests.fake_judge import judge_by_exact_match, serve
from tests.judge_modes import DECORATED, PARAMETERS, THINKING, UNREADABLE, Mode, refuse

TRIPLES = [Triple("what color?", "teal", text) for text in ("Teal.", "red", "")]


def ask(server: ServerJudge, count: int = 1) -> list[tuple[str, str]]:
    with server:
        answers = server.ask([grading_conversation(TRIPLES[0])] * count, 32)
    return [(answer.status, answer.text) for answer in answers]


def test_verdicts_over_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTERS_JUDGE_API_KEY", "sesame\n")
    with serve() as fake, ServerJudge(fake.url, None) as server:
        verdicts = judge_triples(server, TRIPLES)
    assert [(v.score, v.status, v.reading) for v in verdicts] == [(1, "ok", "1"), (0, "ok", "0"), (0, "ok", "0")]
    assert fake.keys == {"Bearer sesame"}
    assert {call["model"] for call in fake.requests} == {"exact-match"}  # listed by the server, as none is configured
    assert {call["temperature"] for call in fake.requests} == {0}
    assert {call["max_tokens"] for call in fake.requests} == {256, 8}


@pytest.mark.parametrize(("models", "configured", "expected"), [(("a", "b"), "b", "b"), ((), None, "default")])
def test_requests_name_the_configured_or_listed_model(
    models: tuple[str, ...], configured: str | None, expected: str
) -> None:
    with serve(models=models) as fake:
        assert ask(ServerJudge(fake.url, configured))[0][0] == "ok"
    assert {call["model"] for call in fake.requests} == {expected}


def test_the_models_are_listed_once() -> None:
    with serve() as fake, ServerJudge(fake.url, None, style=STYLES[0]) as server:
        judge_triples(server, TRIPLES * 8)
    assert fake.listings == 1


def test_server_errors_are_retried() -> None:
    replies = [(500, b"{}"), (503, b"busy"), (429, b"{}")]
    with serve(reply=lambda user: replies.pop(0) if replies else (200, judge_by_exact_match(user))) as fake:
        assert ask(ServerJudge(fake.url, "m", retries=3))[0][0] == "ok"
    assert len(fake.requests) == 4


def test_a_persistent_error_is_a_failure() -> None:
    with serve(reply=lambda _: (500, b'{"error": {"message": "out of memory"}}')) as fake:
        ((status, text),) = ask(ServerJudge(fake.url, "m", retries=1))
    assert (status, len(fake.requests)) == ("judge_failed", 2)
    assert "500" in text and "out of memory" in text


@pytest.mark.parametrize(("code", "status"), [(400, "refused"), (413, "refused"), (401, "judge_failed")])
def test_client_errors_are_not_retried(code: int, status: str) -> None:
    with serve(reply=lambda _: (code, b"{}")) as fake:
        assert ask(ServerJudge(fake.url, "m"))[0][0] == status
    assert len(fake.requests) == (len(STYLES) if code == 400 else 1)  # 400 may refuse a parameter


def test_a_text_that_is_refused_is_not_sent_again_once_the_style_is_known() -> None:
    with serve(reply=lambda user: (400, b"{}") if "red" in user else (200, judge_by_exact_match(user))) as fake:
        with ServerJudge(fake.url, "m") as server:
            statuses = [verdict.status for verdict in judge_triples(server, TRIPLES)]
    assert (statuses, len(fake.requests)) == (["ok", "refused", "ok"], 5)


def test_a_first_text_that_is_refused_for_itself_leaves_the_style_open() -> None:
    with serve(reply=lambda user: (400, b"{}") if "Teal." in user else (200, judge_by_exact_match(user))) as fake:
        with ServerJudge(fake.url, "m") as server:
            statuses = [verdict.status for verdict in judge_triples(server, TRIPLES)]
    assert (statuses, server.style) == (["refused", "ok", "ok"], STYLES[0])


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_parameters_that_a_server_takes_are_found_once(name: str) -> None:
    """Before requests go out side by side, so that each style is refused once at most."""
    with serve(respond=PARAMETERS[name].respond) as fake, ServerJudge(fake.url, "m") as server:
        assert [verdict.score for verdict in judge_triples(server, TRIPLES)] == [1, 0, 0]
        refused = len(fake.requests) - 2 * len(TRIPLES)
        assert 0 <= refused < len(STYLES)
    assert all("question>" in call["messages"][-1]["content"] for call in fake.requests[: refused + len(TRIPLES)])
    with serve(respond=PARAMETERS[name].respond) as fake, ServerJudge(fake.url, "m", style=server.style) as again:
        judge_triples(again, TRIPLES)
    assert len(fake.requests) == 2 * len(TRIPLES)  # what is known is not tried again


@pytest.mark.parametrize(
    "refuses", [refuse(system=True), refuse("max_tokens"), refuse("temperature"), refuse("max_tokens", system=True)]
)
def test_a_refusal_by_an_error_of_the_server_is_found_too(refuses: Callable[[dict], str | None]) -> None:
    """Servers whose chat template raises answer so. Only the refused style is retried."""
    with serve(respond=Mode(refuses, refusal_code=500).respond) as fake:
        with ServerJudge(fake.url, "m", retries=1) as server:
            assert [verdict.score for verdict in judge_triples(server, TRIPLES)] == [1, 0, 0]
    assert len(fake.requests) < 1 + len(STYLES) + 2 * len(TRIPLES)


@pytest.mark.parametrize("name", DECORATED)
def test_decorated_replies_are_read(name: str) -> None:
    with serve(respond=DECORATED[name].respond) as fake, ServerJudge(fake.url, "m") as server:
        assert [verdict.score for verdict in judge_triples(server, TRIPLES)] == [1, 0, 0]


@pytest.mark.parametrize("name", THINKING)
def test_a_judge_that_thinks_needs_room(name: str) -> None:
    limits = TokenLimits.for_each_reply(1024)
    with serve(respond=THINKING[name].respond) as fake, ServerJudge(fake.url, "m") as server:
        assert [verdict.score for verdict in judge_triples(server, TRIPLES, limits)] == [1, 0, 0]
        assert {verdict.status for verdict in judge_triples(server, TRIPLES)} == {"parse_failed"}
    assert {call["max_tokens"] for call in fake.requests} == {1024, 256}


@pytest.mark.parametrize("name", UNREADABLE)
def test_replies_in_doubt_are_no_verdict(name: str) -> None:
    with serve(respond=UNREADABLE[name].respond) as fake, ServerJudge(fake.url, "m") as server:
        assert {verdict.status for verdict in judge_triples(server, TRIPLES[:1])} <= {"parse_failed", "refused"}


@pytest.mark.parametrize("reason", ["length", "MAX_TOKENS", "max_output_tokens"])
def test_a_reply_at_its_limit_is_cut_off_whatever_the_server_calls_it(reason: str) -> None:
    choice = dict(index=0, message=dict(role="assistant", content="it goes on"), finish_reason=reason)
    body = dict(id="1", object="chat.completion", created=0, model="m", choices=[choice])
    with serve(respond=lambda call: (200, body)) as fake:
        assert ask(ServerJudge(fake.url, "m")) == [("cut_off", "it goes on")]


def test_a_judge_that_times_out_gives_judge_failed() -> None:
    with serve(reply=lambda _: (200, 2.0)) as fake:
        ((status, text),) = ask(ServerJudge(fake.url, "m", timeout=0.2, retries=1))
    assert (status, len(fake.requests)) == ("judge_failed", 2)
    assert "APITimeoutError" in text


@pytest.mark.parametrize("body", [b"", b"<html>hello</html>", b"[]", b"{}", b'"1"', b'{"choices": []}', b"\xff\xfe"])
def test_a_body_without_a_chat_completion_is_a_failure(body: bytes) -> None:
    with serve(reply=lambda _: (200, body)) as fake:
        assert ask(ServerJudge(fake.url, "m", retries=0))[0][0] == "judge_failed"


def test_a_reply_without_a_score_is_a_parse_failure() -> None:
    with serve(reply=lambda _: (200, "\u2603 <answer>maybe</answer>")) as fake, ServerJudge(fake.url, "m") as server:
        assert {(v.score, v.status) for v in judge_triples(server, TRIPLES)} == {(None, "parse_failed")}


def test_a_reply_cut_at_the_token_limit_has_its_own_status() -> None:
    with serve(reply=lambda _: (200, "it goes on [cut]")) as fake:
        assert ask(ServerJudge(fake.url, "m"))[0] == ("cut_off", "it goes on [cut]")


def test_concurrent_requests_are_bounded() -> None:
    with serve(reply=lambda _: (200, 0.1)) as fake:
        assert len(ask(ServerJudge(fake.url, "m", requests=3), count=12)) == 12
    assert 2 <= fake.max_concurrent <= 3


def test_no_requests_after_many_failures_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_server, "MAX_CONSECUTIVE_FAILURES", 4)
    with serve(reply=lambda _: (500, b"{}")) as fake:
        answers = ask(ServerJudge(fake.url, "m", requests=1, retries=0), count=10)
    assert len(fake.requests) == 4
    assert {status for status, _ in answers} == {"judge_failed"}
    assert "not asked after 4 failures in a row (HTTP 500" in answers[-1][1]


def test_a_judge_url_without_a_server_gives_judge_failed() -> None:
    with serve() as fake:
        url = fake.url
    ((status, text),) = ask(ServerJudge(url, None, retries=0))
    assert status == "judge_failed"
    assert "APIConnectionError" in text


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://host:8000", "http://host:8000/v1"),
        ("https://host/", "https://host/v1"),
        ("http://host/api/v3/", "http://host/api/v3"),
        ("http://[::1]:80/v1", "http://[::1]:80/v1"),
        ("HTTP://host/v1/chat/completions", "http://host/v1"),
    ],
)
def test_base_url_of_the_api(url: str, base: str) -> None:
    assert api_base_url(url) == base


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:host",
        "http://host:port",
        "http://[::1",
        "http://host:99999",
        "http://host/v1?key=1",
        "http://ho st",
        "http://user:secret@host/v1",
    ],
)
def test_a_malformed_url_is_refused_without_showing_secrets(url: str) -> None:
    with pytest.raises(InputError, match=r"rewards\.judge") as error:
        api_base_url(url)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)
