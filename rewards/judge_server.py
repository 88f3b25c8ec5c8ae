"""A judge behind the URL of an OpenAI-compatible server: bounded concurrency, retries with back-off, time-outs.

A server may send so much, for so long, from nowhere else: an answer is a few hundred tokens.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, cast

import httpx
import openai

from masters.config.judge_url import KEY
from masters.rewards.judge import Answer
from masters.rewards.judge_prompts import Conversation

RETRIES = 8  # a request, 0.5 s to 8 s apart (a server may ask for more): about 40 s without an answer
GIVE_UP = 32  # requests in a row without an answer, each after its retries
LONGEST_NAME = 1000  # characters
UNNAMED = "default"  # asked for where the server lists no model; servers of one model ignore the name
NOT_THIS_PROMPT = (400, 413, 422)

LARGEST = 1 << 20  # bytes of an answer


class Server:
    """Answers conversations over HTTP. After GIVE_UP failures in a row it asks no more: the judge is down."""

    def __init__(
        self, url: str, model: str | None, requests: int = 16, timeout: float = 60.0, retries: int = RETRIES
    ) -> None:
        key = os.environ.get(KEY, "").strip() or "none"
        http: Any = client(timeout)  # openai declares the client of a fork of httpx, and takes either
        self._client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=retries, http_client=http)
        self._model, self._requests = model, requests
        self._lock, self._failures, self._reason = Lock(), 0, ""

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def ask(self, conversations: list[Conversation], max_tokens: int) -> list[Answer]:
        with ThreadPoolExecutor(self._requests) as pool:
            return list(pool.map(lambda conversation: self._one(conversation, max_tokens), conversations))

    def _one(self, conversation: Conversation, max_tokens: int) -> Answer:
        if self._failures >= GIVE_UP:
            return Answer(f"not asked after {GIVE_UP} failures in a row ({self._reason})", "judge_failed")
        answer = self._answer(conversation, max_tokens)
        with self._lock:
            failed = answer.status == "judge_failed"
            self._failures, self._reason = (self._failures + 1, answer.text) if failed else (0, "")
        return answer

    def _answer(self, conversation: Conversation, max_tokens: int) -> Answer:
        try:
            messages = cast(Any, conversation)
            completion = self._client.chat.completions.create(
                model=self._named(), messages=messages, temperature=0, max_tokens=max_tokens
            )
            choice = completion.choices[0]
            return Answer(_text(choice.message.content), "cut_off" if choice.finish_reason == "length" else "ok")
        except openai.APIStatusError as error:
            status = "refused" if error.status_code in NOT_THIS_PROMPT else "judge_failed"
            return Answer(f"HTTP {error.status_code}: {_line(error.message)}", status)
        except openai.OpenAIError as error:
            return Answer(_line(f"{type(error).__name__}: {error}"), "judge_failed")
        except Exception as error:  # whatever was sent instead of a chat completion
            return Answer(f"no chat completion ({_line(f'{type(error).__name__}: {error}')})", "judge_failed")

    def _named(self) -> str:
        """The model's name: as configured, else the first that the server lists."""
        if self._model is None:
            try:
                listed = self._client.with_options(max_retries=0).models.list().data[0].id
                if not isinstance(listed, str) or not 0 < len(listed) <= LONGEST_NAME:
                    return UNNAMED
                self._model = listed
            except Exception:  # whatever was sent instead of a list
                return UNNAMED
        return self._model


def _text(content: object) -> str:
    """What a judge said, fit for a table. Raises TypeError if that is no text."""
    if content is not None and not isinstance(content, str):
        raise TypeError(f"its content is no text but {type(content).__name__}")
    return (content or "").encode(errors="replace").decode()


def _line(text: str) -> str:
    return " ".join(text.split())[:300]


class Limited(httpx.SyncByteStream):
    """A body that ends with an error when it is too long or takes too long: read time-outs hold for a piece alone."""

    def __init__(self, body: httpx.SyncByteStream, seconds: float) -> None:
        self._body, self._seconds = body, seconds

    def __iter__(self) -> Iterator[bytes]:
        deadline, size = time.monotonic() + self._seconds, 0
        for piece in self._body:
            size += len(piece)
            if size > LARGEST:
                raise httpx.DecodingError(f"an answer of more than {LARGEST} bytes")
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout(f"an answer of more than {self._seconds:g} s")
            yield piece

    def close(self) -> None:
        self._body.close()


def client(seconds: float) -> httpx.Client:
    """An HTTP client with these limits that follows no redirect: who allowed a host did not allow another."""

    def limit(response: httpx.Response) -> None:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise httpx.DecodingError("a compressed answer, which was not asked for")
        if isinstance(response.stream, httpx.SyncByteStream):
            response.stream = Limited(response.stream, seconds)

    headers = {"Accept-Encoding": "identity"}  # what is small when packed may be without end
    return httpx.Client(
        timeout=seconds, follow_redirects=False, headers=headers, event_hooks=dict(response=[limit]),
        limits=httpx.Limits(max_connections=None),
    )  # fmt: skip
