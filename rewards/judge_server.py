"""An LLM judge behind an OpenAI-compatible server: bounded concurrency, retries with back-off, time-outs.

A server is not trusted: replies are limited in size and time, and redirects are not followed.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, cast

import httpx
import openai

from masters.config.judge_url import API_KEY_VARIABLE
from masters.rewards.judge import JudgeReply
from masters.rewards.judge_prompts import Conversation

MAX_RETRIES = 8  # per request, 0.5 s to 8 s apart (a server may ask for more): about 40 s without an answer
MAX_CONSECUTIVE_FAILURES = 32  # requests, each after its retries
MAX_NAME_LENGTH = 1000  # characters of a model's name
MAX_ANSWER_BYTES = 1 << 20  # an answer is a few hundred tokens
DEFAULT_MODEL = "default"  # where the server lists no model: servers of one model ignore the name
REFUSAL_CODES = (400, 413, 422)  # HTTP codes by which a server refuses a prompt


class ServerJudge:
    """A `JudgeClient` over HTTP. After MAX_CONSECUTIVE_FAILURES it sends no more requests: the judge is down."""

    def __init__(
        self, url: str, model: str | None, requests: int = 16, timeout: float = 60.0, retries: int = MAX_RETRIES
    ) -> None:
        key = os.environ.get(API_KEY_VARIABLE, "").strip() or "none"
        http: Any = make_http_client(timeout)  # openai accepts it, but declares the client of a fork of httpx
        self._client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=retries, http_client=http)
        self._model, self._requests = model, requests
        self._lock, self._failures, self._reason = Lock(), 0, ""

    def __enter__(self) -> "ServerJudge":
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def ask(self, conversations: list[Conversation], max_tokens: int) -> list[JudgeReply]:
        with ThreadPoolExecutor(self._requests) as pool:
            return list(pool.map(lambda conversation: self._ask_unless_down(conversation, max_tokens), conversations))

    def _ask_unless_down(self, conversation: Conversation, max_tokens: int) -> JudgeReply:
        if self._failures >= MAX_CONSECUTIVE_FAILURES:
            reason = f"not asked after {MAX_CONSECUTIVE_FAILURES} failures in a row ({self._reason})"
            return JudgeReply(reason, "judge_failed")
        reply = self._send(conversation, max_tokens)
        with self._lock:
            failed = reply.status == "judge_failed"
            self._failures, self._reason = (self._failures + 1, reply.text) if failed else (0, "")
        return reply

    def _send(self, conversation: Conversation, max_tokens: int) -> JudgeReply:
        try:
            messages = cast(Any, conversation)
            completion = self._client.chat.completions.create(
                model=self._model_name(), messages=messages, temperature=0, max_tokens=max_tokens
            )
            choice = completion.choices[0]
            return JudgeReply(_text(choice.message.content), "cut_off" if choice.finish_reason == "length" else "ok")
        except openai.APIStatusError as error:
            status = "refused" if error.status_code in REFUSAL_CODES else "judge_failed"
            return JudgeReply(f"HTTP {error.status_code}: {_one_line(error.message)}", status)
        except openai.OpenAIError as error:
            return JudgeReply(_one_line(f"{type(error).__name__}: {error}"), "judge_failed")
        except Exception as error:  # the server may send anything instead of a chat completion
            return JudgeReply(f"no chat completion ({_one_line(f'{type(error).__name__}: {error}')})", "judge_failed")

    def _model_name(self) -> str:
        """The configured model, else the first that the server lists."""
        if self._model is None:
            try:
                listed = self._client.with_options(max_retries=0).models.list().data[0].id
                if not isinstance(listed, str) or not 0 < len(listed) <= MAX_NAME_LENGTH:
                    return DEFAULT_MODEL
                self._model = listed
            except Exception:  # the server may send anything instead of a list
                return DEFAULT_MODEL
        return self._model


def _text(content: object) -> str:
    """A reply's text, encodable as UTF-8. Raises TypeError if it is not a text."""
    if content is not None and not isinstance(content, str):
        raise TypeError(f"its content is no text but {type(content).__name__}")
    return (content or "").encode(errors="replace").decode()


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


class LimitedStream(httpx.SyncByteStream):
    """A response body that raises when it is too large or takes too long: httpx's read time-out is per chunk."""

    def __init__(self, body: httpx.SyncByteStream, seconds: float) -> None:
        self._body, self._seconds = body, seconds

    def __iter__(self) -> Iterator[bytes]:
        deadline, size = time.monotonic() + self._seconds, 0
        for chunk in self._body:
            size += len(chunk)
            if size > MAX_ANSWER_BYTES:
                raise httpx.DecodingError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout(f"an answer of more than {self._seconds:g} s")
            yield chunk

    def close(self) -> None:
        self._body.close()


def make_http_client(seconds: float) -> httpx.Client:
    """Create an HTTP client with these limits. It follows no redirect, since only the configured host is allowed."""

    def limit(response: httpx.Response) -> None:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise httpx.DecodingError("a compressed answer, which was not asked for")
        if isinstance(response.stream, httpx.SyncByteStream):
            response.stream = LimitedStream(response.stream, seconds)

    return httpx.Client(
        timeout=seconds,
        follow_redirects=False,
        headers={"Accept-Encoding": "identity"},  # a small compressed answer may expand without bound
        event_hooks=dict(response=[limit]),
        limits=httpx.Limits(max_connections=None),
    )
