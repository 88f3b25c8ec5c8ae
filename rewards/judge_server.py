"""An LLM judge behind an OpenAI-compatible server: bounded concurrency, retries with back-off, time-outs.

A server that refuses the first request is sent it in other styles (`RequestStyle`); the one that it takes is kept. A
server is not trusted: replies are limited in size and time, and redirects are not followed.
"""

import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import httpx
import openai

from masters.config.judge_url import API_KEY_VARIABLE
from masters.rewards.judge import JudgeReply
from masters.rewards.judge_completion import read_completion
from masters.rewards.judge_prompts import Conversation
from masters.rewards.judge_request import STYLES, RequestStyle

MAX_RETRIES = 8  # per request, 0.5 s to 8 s apart (a server may ask for more): about 40 s without an answer
MAX_CONSECUTIVE_FAILURES = 32  # requests, each after its retries
MAX_NAME_LENGTH = 1000  # characters of a model's name
MAX_ANSWER_BYTES = 1 << 20  # an answer is a few hundred tokens
DEFAULT_MODEL = "default"  # where the server lists no model: servers of one model ignore the name
REFUSAL_CODES = (400, 413, 422)  # HTTP codes by which a server refuses a prompt
RETRIED_CODES = (408, 409, 429)  # HTTP codes that the openai client retries, like those from 500 on
PARAMETER_REFUSAL_CODES = (400, 422)
# in the message of an HTTP 5xx: some servers answer a parameter or a system turn that they do not take with one
PARAMETER_NAMES = re.compile(
    r"\brole\b|system (?:message|prompt|turn)|temperature|max_\w*tokens|template", re.IGNORECASE
)


class ServerJudge:
    """A `JudgeClient` over HTTP. After MAX_CONSECUTIVE_FAILURES it sends no more requests: the judge is down.

    `style`: the parameters that the server is known to take; None: found by the first requests.
    """

    def __init__(
        self,
        url: str,
        model: str | None,
        requests: int = 16,
        timeout: float = 60.0,
        retries: int = MAX_RETRIES,
        style: RequestStyle | None = None,
    ) -> None:
        key = os.environ.get(API_KEY_VARIABLE, "").strip() or "none"
        http: Any = make_http_client(timeout)  # openai accepts it, but declares the client of a fork of httpx
        self._client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=retries, http_client=http)
        self._model, self._requests = model, requests
        self._lock, self._failures, self._reason = Lock(), 0, ""
        self._style_lock, self.style = Lock(), style

    def __enter__(self) -> "ServerJudge":
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def ask(self, conversations: list[Conversation], max_tokens: int) -> list[JudgeReply]:
        # the first request finds style and model for those that are sent side by side
        alone = 1 if self.style is None or self._model is None else 0
        first = [self._ask_unless_down(conversation, max_tokens) for conversation in conversations[:alone]]
        with ThreadPoolExecutor(self._requests) as pool:
            rest = conversations[alone:]
            return first + list(pool.map(lambda conversation: self._ask_unless_down(conversation, max_tokens), rest))

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
            return self._request_in_accepted_style(conversation, max_tokens)
        except openai.APIStatusError as error:
            status = "refused" if error.status_code in REFUSAL_CODES else "judge_failed"
            may_pass = error.status_code in RETRIED_CODES or error.status_code >= 500
            reason = f"HTTP {error.status_code}: {_one_line(error.message)}"
            return JudgeReply(reason, status, may_pass=may_pass, status_code=error.status_code)
        except openai.OpenAIError as error:
            may_pass = isinstance(error, openai.APITimeoutError)
            return JudgeReply(_one_line(f"{type(error).__name__}: {error}"), "judge_failed", may_pass=may_pass)
        except Exception as error:  # the server may send anything instead of a chat completion
            return JudgeReply(f"no chat completion ({_one_line(f'{type(error).__name__}: {error}')})", "judge_failed")

    def _request_in_accepted_style(self, conversation: Conversation, max_tokens: int) -> JudgeReply:
        """Send a request in the style that the server takes; until one is known, in each style until it is taken.

        Raises what `_request` raises, for the first style if the server refuses all of them.
        """
        known = self.style
        try:
            reply = self._request(known or STYLES[0], conversation, max_tokens)
            self.style = known or STYLES[0]
            return reply
        except openai.APIStatusError as error:
            if known or not _refuses_parameter(error):
                raise
            refusal = error
        retries = 0 if refusal.status_code >= 500 else None  # the first style's retries have shown that it stays
        with self._style_lock:
            for style in [self.style] if self.style else STYLES[1:]:
                try:
                    reply = self._request(style, conversation, max_tokens, retries)
                except openai.APIStatusError as error:
                    if not _refuses_parameter(error):
                        raise
                else:
                    self.style = style
                    return reply
        raise refusal

    def _request(
        self, style: RequestStyle, conversation: Conversation, max_tokens: int, retries: int | None = None
    ) -> JudgeReply:
        """Send a request in a style. `retries`: None for the client's own number. Raises what the client raises."""
        client = self._client if retries is None else self._client.with_options(max_retries=retries)
        parameters: Any = style.parameters(conversation, max_tokens)
        return read_completion(client.chat.completions.create(model=self._model_name(), **parameters))

    def _model_name(self) -> str:
        """Return the configured model, else the first that the server lists."""
        if self._model is None:
            try:
                listed = self._client.with_options(max_retries=0).models.list().data[0].id
                if not isinstance(listed, str) or not 0 < len(listed) <= MAX_NAME_LENGTH:
                    return DEFAULT_MODEL
                self._model = listed
            except Exception:  # the server may send anything instead of a list
                return DEFAULT_MODEL
        return self._model


def _refuses_parameter(error: openai.APIStatusError) -> bool:
    """Return whether an error may refuse a parameter or a system turn, rather than a text."""
    is_named = error.status_code >= 500 and PARAMETER_NAMES.search(error.message)
    return error.status_code in PARAMETER_REFUSAL_CODES or bool(is_named)


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
