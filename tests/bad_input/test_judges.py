"""Judge servers with invalid replies: a missing verdict is a status, never a score and never a crash."""

import gzip
import html
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import pytest

from masters.rewards import judge_server
from masters.rewards.judge import judge_triples
from masters.rewards.judge_server import DEFAULT_MODEL, ServerJudge
from masters.rewards.verdict import Triple, Verdict
from tests import fake_judge
from tests.fake_judge import FakeJudge

TRIPLE = Triple("what color?", "teal", "Teal.")
FIRST = "It compares. <answer>1</answer>"


def completion(content: object, **changes: object) -> bytes:
    choice = dict(index=0, message=dict(role="assistant", content=content), finish_reason="stop") | changes
    return json.dumps(dict(id="1", object="chat.completion", created=0, model="m", choices=[choice])).encode()


# the first reply, the status of the verdict, and a part of its explanation
FIRSTS: dict[str, tuple[object, str, str]] = {
    "nothing": ("", "parse_failed", ""),
    "prose": ("I would say that it is right.", "parse_failed", "I would say"),
    "a bare number": ("1", "parse_failed", "1"),
    "above one": ("<answer>2</answer>", "parse_failed", "2"),
    "far above one": ("<answer>1e308</answer>", "parse_failed", "1e308"),
    "below zero": ("<answer>-1</answer>", "parse_failed", "-1"),
    "a fraction": ("<answer>0.5</answer>", "parse_failed", "0.5"),
    "one, as a fraction": ("<answer>1.0</answer>", "parse_failed", "1.0"),
    "NaN": ("<answer>NaN</answer>", "parse_failed", "NaN"),
    "infinity": ("<answer>inf</answer>", "parse_failed", "inf"),
    "null": ("<answer>null</answer>", "parse_failed", "null"),
    "an empty tag": ("<answer></answer>", "parse_failed", "<answer>"),
    "both scores": ("<answer>0</answer> <answer>1</answer>", "parse_failed", "<answer>0"),
    "more after the tag": ("<answer>1</answer> unless it is 0", "parse_failed", "unless"),
    "another alphabet's one": ("<answer>١</answer>", "parse_failed", "<answer>"),
    "100 KB": ("so " * 33_000, "parse_failed", "so so"),
    "right-to-left": ("\u202e<answer>1</answer>\u202c", "parse_failed", "<answer>"),
    "a refusal": (completion(None), "parse_failed", ""),
    "half a surrogate": (completion("\ud800"), "parse_failed", "?"),
    "a number for a text": (completion(1), "judge_failed", "no text but int"),
    "NaN for a text": (completion(float("nan")), "judge_failed", "no text but float"),
    "parts of no kind": (completion([FIRST]), "judge_failed", "no text but list"),
    "parts without a text": (completion([dict(type="text", text=7)]), "judge_failed", "no text but int"),
    "parts with thoughts alone": (completion([dict(type="thinking", thinking=FIRST)]), "parse_failed", ""),
    "a refusal in its field": (
        completion(None, message=dict(role="assistant", content=None, refusal="I cannot grade this.")),
        "parse_failed", "the judge refuses: I cannot grade this.",
    ),
    "a filtered reply": (completion(None, finish_reason="content_filter"), "parse_failed", "content filter"),
    "an error in a successful response": (
        b'{"error": {"message": "no credit left", "code": 402}}', "judge_failed", "no credit left",
    ),
    "truth for a text": (completion(True), "judge_failed", "no text but bool"),
    "no choices": (b'{"choices": []}', "judge_failed", "no chat completion"),
    "null choices": (b'{"choices": null}', "judge_failed", "no chat completion"),
    "choices of no kind": (b'{"choices": [1]}', "judge_failed", "no chat completion"),
    "a list": (b"[]", "judge_failed", "no chat completion"),
    "null as json": (b"null", "judge_failed", "no chat completion"),
    "no json": (b"<html>busy</html>", "judge_failed", ""),
    "no utf-8": (b'{"choices": "\xff"}', "judge_failed", ""),
    "nested without end": (b"[" * 200_000, "judge_failed", ""),
    "number of 5000 digits": (b'{"choices": ' + b"1" * 5000 + b"}", "judge_failed", ""),
    "two megabytes": (completion("x" * (2 << 20)), "judge_failed", ""),
}  # fmt: skip


SECONDS = {
    repr(reply_text)[:40]: reply_text
    for reply_text in (
        "", "0", "2", "-1", "1.0", "NaN", "yes", "1\n0", "<answer>1</answer>", "１", completion(1), completion(None),
        b"{}",
    )
}  # fmt: skip
STATUSES = (204, 301, 307, 400, 401, 403, 404, 418, 422, 429, 500, 503, 599)


def verdict(server: FakeJudge, timeout: float = 5.0) -> Verdict:
    with ServerJudge(server.url, "m", timeout=timeout, retries=0) as judge:
        (found,) = judge_triples(judge, [TRIPLE])
    return found


def verdicts(replies: dict[str, tuple[int, object]], first: str | None = None) -> dict[str, Verdict]:
    """Return by case the verdict on a reply to the first call, or to the second call after `first`."""

    def reply(user: str) -> tuple[int, object]:
        if first and "<question>" in user:
            return 200, f"{fake_judge.tag_content(user, 'generated_text')} {first}"
        return next(answer for case, answer in replies.items() if f"[{case}]" in html.unescape(user))

    with fake_judge.serve(reply=reply) as server, ServerJudge(server.url, "m", timeout=60.0, retries=0) as judge:
        found = judge_triples(judge, [Triple("what color?", "teal", f"[{case}]") for case in replies])
    return dict(zip(replies, found, strict=True))


@pytest.fixture(scope="module")
def firsts() -> dict[str, Verdict]:
    return verdicts({case: (200, reply_text) for case, (reply_text, _, _) in FIRSTS.items()})


@pytest.fixture(scope="module")
def seconds() -> dict[str, Verdict]:
    return verdicts({case: (200, reply_text) for case, reply_text in SECONDS.items()}, FIRST)


@pytest.fixture(scope="module")
def refusals() -> dict[str, Verdict]:
    return verdicts({str(status): (status, FIRST) for status in STATUSES})


@pytest.mark.parametrize("name", FIRSTS)
def test_invalid_first_reply_gives_no_score(firsts: dict[str, Verdict], name: str) -> None:
    found, (_, status, explanation) = firsts[name], FIRSTS[name]
    assert (found.score, found.status) == (None, status)
    assert explanation in found.explanation
    found.explanation.encode()  # a table can store it


@pytest.mark.parametrize("reply_text", SECONDS)
def test_invalid_second_reply_gives_no_score(seconds: dict[str, Verdict], reply_text: str) -> None:
    assert seconds[reply_text].score is None and seconds[reply_text].status in ("parse_failed", "judge_failed")


def test_equal_scores_in_both_replies_are_a_verdict() -> None:
    assert verdicts({"right": (200, "1")}, FIRST)["right"].score == 1.0


@pytest.mark.parametrize("status", STATUSES)
def test_other_http_statuses_give_no_verdict(refusals: dict[str, Verdict], status: int) -> None:
    found = refusals[str(status)]
    assert found.score is None and found.status in ("judge_failed", "refused")


@contextmanager
def serve_bytes(answer: bytes, slowly: int = 0) -> Iterator[FakeJudge]:
    """Serve these bytes on every connection, the last `slowly` of them one at a time."""
    listener = socket.create_server(("127.0.0.1", 0))
    ended = []

    def serve() -> None:
        while not ended:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.recv(1 << 16)
                    connection.sendall(answer[: len(answer) - slowly])
                    for place in range(len(answer) - slowly, len(answer)):
                        time.sleep(0.1)
                        connection.sendall(answer[place : place + 1])
                except OSError:
                    pass

    thread = Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield FakeJudge(url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
    finally:
        ended.append(True)
        listener.close()


def http(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def test_slow_reply_ends_at_the_time_limit() -> None:
    """Each byte is in time, but all of them would take 15 minutes."""
    began = time.monotonic()
    with serve_bytes(http(b" " * 9000), slowly=9000) as server:
        found = verdict(server, timeout=1.0)
    assert found.status == "judge_failed" and time.monotonic() - began < 300


def test_endless_reply_ends_at_the_size_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_server, "MAX_ANSWER_BYTES", 1000)
    with serve_bytes(http(completion(FIRST) + b" " * 100_000)) as server:
        assert verdict(server).status == "judge_failed"


def test_compressed_reply_is_not_decompressed() -> None:
    bomb = gzip.compress(bytes(20 << 20))
    with serve_bytes(http(bomb, "Content-Encoding: gzip")) as server:
        assert verdict(server).status == "judge_failed"


@pytest.mark.parametrize("answer", [b"", b"\0" * 100, b"HTTP/1.1 200", b"SSH-2.0-OpenSSH\r\n", http(b"{}")[:-1]])
def test_reply_that_is_not_http_gives_no_verdict(answer: bytes) -> None:
    with serve_bytes(answer) as server:
        assert verdict(server).status == "judge_failed"


def test_redirects_are_not_followed() -> None:
    """An allowed host cannot redirect the request and its API key to another host."""
    with fake_judge.serve() as other:
        with serve_bytes(
            http(b"", f"Location: {other.url}/chat/completions", status="307 Temporary Redirect")
        ) as server:
            assert verdict(server).status == "judge_failed"
        assert other.requests == []


@pytest.mark.parametrize("listed", [None, 7, "", [], {}, "x" * 2000], ids=lambda value: repr(value)[:20])
def test_server_that_lists_no_model_name_is_asked_without_one(listed: object) -> None:
    with fake_judge.serve(models=(listed,)) as server, ServerJudge(server.url, None, retries=0) as judge:
        (found,) = judge_triples(judge, [TRIPLE])
        assert found.status == "ok" and server.requests[0]["model"] == DEFAULT_MODEL
